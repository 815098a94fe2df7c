//! A user's browser: keeps cookies, fills in no form by itself, and follows no redirect.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::RootCertStore;
use tokio::net::TcpStream;
use url::Url;
use url::form_urlencoded::Serializer;

use super::agent::{Heard, Reply};
use super::raw::Raw;
use super::{World, soon};

/// A browser. A clone is another tab of it, as of now.
#[derive(Clone)]
pub struct Browser {
    admin: SocketAddr,
    heard: Heard,
    /// What it takes the address to be; the address itself when nothing else leads there.
    pub host: String,
    pub scheme: &'static str,
    pub cookies: BTreeMap<String, String>,
}

/// What a browser shows.
pub struct Page {
    pub reply: Reply,
}

impl World {
    /// A browser that has never been here.
    pub fn browser(&self) -> Browser {
        self.browser_at(self.admin)
    }

    /// A browser that has never been at this address.
    pub fn browser_at(&self, admin: SocketAddr) -> Browser {
        let (heard, host) = (self.heard.clone(), admin.to_string());
        Browser { admin, heard, host, scheme: "http", cookies: BTreeMap::new() }
    }

    /// A call of the admin API, or anything else that is asked of the admin listener by a program.
    pub async fn asks(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Reply {
        self.browser().says(method, path, fields, body).await
    }

    /// A user connects with a browser of their own.
    pub async fn connects(&self, user: &str) -> Page {
        let mut browser = self.browser();
        let query = Serializer::new(String::new()).append_pair("user", user).finish();
        let at_the_provider = browser.goes_to_the_provider(&format!("/connect/main?{query}")).await;
        let page = browser.comes_back(&self.issued.says_yes(&at_the_provider)).await;
        assert_eq!(page.reply.status, 200, "{}", page.reply.text());
        page
    }
}

impl Browser {
    /// Opens an address, or a link that it was given.
    pub async fn opens(&mut self, link: &str) -> Page {
        self.requests("GET", &path_of(link), &[], "").await
    }

    /// Is sent back by the provider, as a browser says that.
    pub async fn comes_back(&mut self, to: &Url) -> Page {
        let sent = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        self.requests("GET", &path_of(to.as_str()), &sent, "").await
    }

    /// Sends a form of a page that it got here.
    pub async fn sends(&mut self, path: &str, form: &[(String, String)]) -> Page {
        let origin = format!("{}://{}", self.scheme, self.host);
        let form = Serializer::new(String::new()).extend_pairs(form).finish();
        let fields = [
            ("content-type", "application/x-www-form-urlencoded"),
            ("origin", origin.as_str()),
            ("sec-fetch-site", "same-origin"),
            ("sec-fetch-mode", "navigate"),
        ];
        self.requests("POST", path, &fields, &form).await
    }

    /// Opens a link and sends its form: the address at the provider.
    pub async fn goes_to_the_provider(&mut self, link: &str) -> Url {
        let page = self.opens(link).await;
        assert_eq!(page.reply.status, 200, "{link}: {}", page.reply.text());
        let sent = self.sends(&page.action(), &page.form()).await;
        assert_eq!(sent.reply.status, 303, "{}", sent.reply.text());
        sent.leads_to()
    }

    async fn requests(&mut self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Page {
        let reply = self.says(method, path, fields, body).await;
        for cookie in reply.headers.get_all("set-cookie") {
            let pair = cookie.to_str().unwrap().split(';').next().unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            self.cookies.insert(name.to_owned(), value.to_owned());
        }
        Page { reply }
    }

    /// A request, on a connection of its own.
    async fn says(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Reply {
        let mut connection = self.begins(method, path, fields, body).await;
        connection.hears().await
    }

    /// As [`Browser::opens`], without waiting for an answer.
    pub async fn begins_to_open(&self, link: &str) -> Raw {
        self.begins("GET", &path_of(link), &[], "").await
    }

    async fn begins(&self, method: &str, path: &str, fields: &[(&str, &str)], body: &str) -> Raw {
        let stream = soon(TcpStream::connect(self.admin)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut connection = Raw::new(stream, Arc::new(RootCertStore::empty()), self.heard.clone());
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        if !fields.iter().any(|(name, _)| *name == "host") {
            head.push_str(&format!("Host: {}\r\n", self.host));
        }
        fields.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        if !self.cookies.is_empty() {
            let pairs: Vec<_> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
            head.push_str(&format!("Cookie: {}\r\n", pairs.join("; ")));
        }
        connection.says(format!("{head}\r\n{body}")).await;
        connection
    }
}

impl Page {
    /// Its first heading.
    pub fn heading(&self) -> String {
        let text = self.reply.text();
        let inner = text.split("<h1>").nth(1).and_then(|rest| rest.split("</h1>").next()).unwrap_or_default();
        inner.replace("<bdi>", "").replace("</bdi>", "")
    }

    /// Its last word in `<code>`: that of a failure.
    pub fn code(&self) -> String {
        let after = self.reply.text().rsplit("<code>").next().unwrap_or_default();
        after.split("</code>").next().unwrap_or_default().to_owned()
    }

    /// Status, heading and code of a page that tells of a failure.
    pub fn failure(&self) -> (u16, String, String) {
        (self.reply.status, self.heading(), self.code())
    }

    /// Where its form goes.
    pub fn action(&self) -> String {
        attribute(self.reply.text().split("<form").nth(1).expect("no form"), "action")
    }

    /// The fields of its form that nobody fills in.
    pub fn form(&self) -> Vec<(String, String)> {
        let form = self.reply.text().split("<form").nth(1).and_then(|rest| rest.split("</form>").next());
        let fields = form.expect("no form").split("<input type=\"hidden\"").skip(1);
        fields.map(|field| (attribute(field, "name"), attribute(field, "value"))).collect()
    }

    /// Where a redirect leads.
    pub fn leads_to(&self) -> Url {
        self.reply.header("location").expect("no location").parse().unwrap()
    }
}

/// The first value of an attribute, with the entities that our pages write.
fn attribute(html: &str, name: &str) -> String {
    let value = html.split(&format!("{name}=\"")).nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    let entities = [("&#38;", "&"), ("&#34;", "\""), ("&#39;", "'"), ("&#60;", "<"), ("&#62;", ">"), ("&amp;", "&")];
    entities.iter().fold(value.to_owned(), |text, (entity, character)| text.replace(entity, character))
}

/// Path and query of an address, which may be one of this listener's own without its host.
fn path_of(link: &str) -> String {
    match Url::parse(link) {
        Ok(url) => url[url::Position::BeforePath..url::Position::AfterQuery].to_owned(),
        Err(_) => link.to_owned(),
    }
}
