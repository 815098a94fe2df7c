//! As much HTTP/1.1 as a load generator needs, read and written by hand so that it costs little.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What every body of the upstream consists of.
pub const FILLING: u8 = b'x';

const LONGEST_HEAD: usize = 64 * 1024;

/// Reads until `buffer` holds a whole head, and gives its length; nothing at an end between two heads.
pub async fn read_head<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            return Ok(Some(end + 4));
        }
        if buffer.len() > LONGEST_HEAD {
            return Err(io::Error::other("the head does not end"));
        }
        if stream.read_buf(buffer).await? == 0 {
            return if buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    }
}

/// The value of a field, by its name in lower case.
pub fn field<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    head.split(|byte| *byte == b'\n').skip(1).find_map(|line| {
        let (field, value) = line.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        field.eq_ignore_ascii_case(name.as_bytes()).then(|| value.trim_ascii())
    })
}

/// The status of an answer.
pub fn status(head: &[u8]) -> Option<u16> {
    std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()
}

/// Whether all of these bytes are the upstream's.
pub fn is_filling(bytes: &[u8]) -> bool {
    bytes.iter().fold(true, |all, byte| all & (*byte == FILLING))
}

/// A connection that is asked one thing after another.
pub struct Connection<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::with_capacity(64 * 1024) }
    }

    /// Sends a request, and gives the length of the body that answers it.
    pub async fn exchange(&mut self, request: &[u8]) -> io::Result<usize> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        let Some(end) = read_head(&mut self.stream, &mut self.buffer).await? else {
            return Err(io::Error::other("hung up in place of an answer"));
        };
        let length = answered(&self.buffer[..end])?;
        self.buffer.drain(..end);
        self.read_body(length).await?;
        Ok(length)
    }

    async fn read_body(&mut self, length: usize) -> io::Result<()> {
        let mut left = length;
        loop {
            let have = self.buffer.len().min(left);
            if !is_filling(&self.buffer[..have]) {
                return Err(io::Error::other("the body is not the upstream's"));
            }
            self.buffer.drain(..have);
            left -= have;
            if left == 0 {
                return Ok(());
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// The length of the body behind a head that says 200.
fn answered(head: &[u8]) -> io::Result<usize> {
    match status(head) {
        Some(200) => {}
        Some(other) => return Err(io::Error::other(format!("answered {other}"))),
        None => return Err(io::Error::other("not an answer")),
    }
    field(head, "content-length")
        .and_then(|value| std::str::from_utf8(value).ok()?.parse().ok())
        .ok_or_else(|| io::Error::other("an answer without Content-Length"))
}
