//! HTTP/2 frame by frame (RFC 9113 section 4.1), for what no library would send.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::raw::Bytestream;
use super::soon;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Settings.
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const NO_ERROR: u32 = 0;
pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The four bytes at this place of the payload.
    pub fn number(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    /// The stream ends with it.
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }
}

/// A frame's bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// RST_STREAM with this code.
pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, code.to_be_bytes())
}

/// GOAWAY after this stream, with this code.
pub fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, [last.to_be_bytes(), code.to_be_bytes()].concat())
}

/// One setting.
pub fn settings(fields: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        fields.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(SETTINGS, 0, 0, payload)
}

/// Room for so many bytes more, on a stream or, at 0, on the connection.
pub fn window_update(stream: u32, bytes: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, bytes.to_be_bytes())
}

/// A header block without compression (RFC 7541 section 6.2.2): whatever stands in the fields.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// A request's header block, with these further fields.
pub fn request(method: &str, path: &str, fields: &[(&str, &str)]) -> Vec<u8> {
    let pseudo = [(":method", method), (":scheme", "https"), (":authority", "api.test"), (":path", path)];
    block(&[&pseudo, fields].concat())
}

/// A string of RFC 7541 section 5.2.
pub fn text(text: &str) -> Vec<u8> {
    [integer(7, text.len()), text.as_bytes().to_vec()].concat()
}

/// A number with so many bits in its first byte (RFC 7541 section 5.1).
pub fn integer(bits: u8, mut number: usize) -> Vec<u8> {
    let most = (1 << bits) - 1;
    if number < most {
        return vec![number as u8];
    }
    number -= most;
    let mut bytes = vec![most as u8];
    while number >= 128 {
        bytes.push((number % 128 + 128) as u8);
        number /= 128;
    }
    bytes.push(number as u8);
    bytes
}

/// A connection that speaks in frames. It acknowledges settings and pings only when told to.
pub struct Frames {
    io: Box<dyn Bytestream>,
}

impl Frames {
    /// The agent's side, with default settings.
    pub async fn agent(io: Box<dyn Bytestream>) -> Self {
        let mut frames = Self { io };
        frames.says([PREFACE, &settings(&[]), &frame(SETTINGS, ACK, 0, [])].concat()).await;
        frames
    }

    /// The server's side, with these settings.
    pub async fn server(mut io: Box<dyn Bytestream>, own: &[(u16, u32)]) -> Self {
        let mut preface = [0; PREFACE.len()];
        io.read_exact(&mut preface).await.unwrap();
        let mut frames = Self { io };
        frames.says([settings(own), frame(SETTINGS, ACK, 0, [])].concat()).await;
        frames
    }

    pub async fn says(&mut self, bytes: impl AsRef<[u8]>) {
        self.tries_to_say(bytes).await.unwrap();
    }

    /// As [`Frames::says`], to somebody who may have had enough.
    pub async fn tries_to_say(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        soon(self.io.write_all(bytes.as_ref())).await?;
        soon(self.io.flush()).await
    }

    /// The next frame, if the other side does not close before.
    pub async fn hears(&mut self) -> Option<Frame> {
        soon(async {
            let mut head = [0; 9];
            self.io.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
            let mut payload = vec![0; length as usize];
            self.io.read_exact(&mut payload).await.ok()?;
            Some(Frame { kind: head[3], flags: head[4], stream, payload })
        })
        .await
    }

    /// The next frame of this kind; what comes before it is passed over.
    pub async fn hears_a(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.hears().await.expect("the connection ended");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// The next request's stream, once the request is whole; pings are answered. None when the connection ends.
    pub async fn hears_a_request(&mut self) -> Option<u32> {
        loop {
            let heard = self.hears().await?;
            if heard.kind == PING && heard.flags & ACK == 0 {
                self.says(frame(PING, ACK, 0, &heard.payload)).await;
            }
            if heard.ends_stream() {
                return Some(heard.stream);
            }
        }
    }

    /// Answers 200 on a stream, with this body.
    pub async fn answers(&mut self, stream: u32, body: &str) {
        let head = frame(HEADERS, END_HEADERS, stream, [0x88]);
        self.says([head, frame(DATA, END_STREAM, stream, body)].concat()).await;
    }

    /// All frames until the other side closes.
    pub async fn hears_to_the_end(&mut self) -> Vec<Frame> {
        let mut all = Vec::new();
        while let Some(frame) = self.hears().await {
            all.push(frame);
        }
        all
    }

    /// Closes it.
    pub async fn ends(mut self) {
        let _ = soon(self.io.shutdown()).await;
    }
}
