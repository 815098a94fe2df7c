// Java's HttpClient, as it comes; run from its source.

import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

public class Client {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] urls) throws Exception {
        System.out.println(call(urls[0]));
        System.in.read();
        System.out.println(call(urls[0]));
        CLIENT.send(get(urls[1]), BodyHandlers.ofLines()).body().forEach(System.out::println);
    }

    private static String call(String url) throws Exception {
        var answer = CLIENT.send(get(url), BodyHandlers.ofString());
        if (answer.statusCode() != 200) throw new Exception("answered " + answer.statusCode());
        return answer.body().trim();
    }

    private static HttpRequest get(String url) {
        return HttpRequest.newBuilder(URI.create(url)).build();
    }
}
