//! Calls, waits to be told that its token is revoked, calls again, and reads a stream as it comes.

use std::error::Error;
use std::io::{self, Write};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let urls: Vec<String> = std::env::args().skip(1).collect();
    let client = reqwest::Client::new();
    println!("{}", call(&client, &urls[0]).await?);
    io::stdin().read_line(&mut String::new())?;
    println!("{}", call(&client, &urls[0]).await?);
    let mut events = client.get(&urls[1]).send().await?;
    while let Some(chunk) = events.chunk().await? {
        io::stdout().write_all(&chunk)?;
        io::stdout().flush()?;
    }
    Ok(())
}

async fn call(client: &reqwest::Client, url: &str) -> Result<String, reqwest::Error> {
    let text = client.get(url).send().await?.error_for_status()?.text().await?;
    Ok(text.trim().to_owned())
}
