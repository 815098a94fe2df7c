//! An HTTP/2 connection, or one of the streams at once on it.

use std::io;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;

use crate::dial::Stream;
use crate::http1;

/// Large enough that the window never holds a proxy up.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// A handle on a connection: clones share it.
#[derive(Clone)]
pub struct Connection {
    send: SendRequest<Bytes>,
}

impl Connection {
    pub async fn open(stream: Stream) -> io::Result<Self> {
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(stream)
            .await
            .map_err(io::Error::other)?;
        // It ends with the last handle; what goes wrong shows in the requests.
        tokio::spawn(connection);
        Ok(Self { send })
    }

    /// Sends a request, and gives the length of the body that answers it.
    pub async fn exchange(&mut self, request: Request<()>) -> io::Result<usize> {
        self.read_answer(request).await.map_err(io::Error::other)?
    }

    async fn read_answer(&mut self, request: Request<()>) -> Result<io::Result<usize>, h2::Error> {
        let mut send = self.send.clone().ready().await?;
        let (answer, _) = send.send_request(request, true)?;
        let answer = answer.await?;
        if answer.status() != 200 {
            return Ok(Err(io::Error::other(format!("answered {}", answer.status().as_u16()))));
        }
        let mut body = answer.into_body();
        let mut length = 0;
        while let Some(part) = body.data().await {
            let part = part?;
            if !http1::is_filling(&part) {
                return Ok(Err(io::Error::other("the body is not the upstream's")));
            }
            length += part.len();
            body.flow_control().release_capacity(part.len())?;
        }
        Ok(Ok(length))
    }
}
