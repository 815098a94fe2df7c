//! Takes what an agent still sends when nobody reads it any more, and throws it away.
//!
//! A connection that is closed with bytes unread is reset, and an agent that is still sending then may never look at the
//! answer that says why (RFC 9112 section 9.6).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Sleep;

/// How long it is done; an agent that reads has ended by then.
const LINGER: Duration = Duration::from_secs(2);
/// At most so many bytes.
const MOST: usize = 32 << 20;

/// The end of a connection whose agent owes the rest of a request.
pub(super) struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl Linger {
    pub(super) fn new() -> Self {
        Self { until: Box::pin(tokio::time::sleep(LINGER)), left: MOST }
    }

    /// Ready when the agent has ended, or enough was done for it.
    pub(super) fn poll(&mut self, mut io: Pin<&mut impl AsyncRead>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut room = [0; 4096];
        while self.left > 0 && self.until.as_mut().poll(cx).is_pending() {
            let mut unread = ReadBuf::new(&mut room);
            ready!(io.as_mut().poll_read(cx, &mut unread))?;
            if unread.filled().is_empty() {
                break;
            }
            self.left = self.left.saturating_sub(unread.filled().len());
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_does_not_end_is_let_go() {
        for sends in [false, true] {
            let (mut agent, mut io) = duplex(1 << 16);
            let sending = tokio::spawn(async move {
                let mut sent = 0;
                while sends && agent.write_all(&[0; 4096]).await.is_ok() {
                    sent += 4096;
                }
                tokio::time::sleep(2 * LINGER).await;
                sent
            });
            let (began, mut linger) = (Instant::now(), Linger::new());
            poll_fn(|cx| linger.poll(Pin::new(&mut io), cx)).await.unwrap();
            assert_eq!(began.elapsed().as_secs(), if sends { 0 } else { LINGER.as_secs() });
            drop(io);
            let sent = sending.await.unwrap();
            assert!(if sends { (MOST..MOST + (1 << 17)).contains(&sent) } else { sent == 0 }, "{sent}");
        }
    }
}
