//! Moves bytes between two TCP connections until both have ended.
//!
//! Few bytes are copied, through memory that is held only while they are; of many, the kernel hands the pages on by itself.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;

/// As much is copied at once.
const CHUNK: usize = 16 << 10;
/// So many full chunks after each other are a long transfer.
const LONG: u32 = 4;
/// How long an agent may take to end that has heard all, and whose upstream hears nothing more.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

/// Moves what either says to the other. Ended when the agent takes nothing that is there for it for `patience`.
///
/// An upstream that is gone may have said much that the agent is still to hear. What the agent says meanwhile is thrown
/// away: closed with that unread, its connection would be reset, and with it go the last bytes that are on their way.
pub(super) async fn pump(agent: &mut TcpStream, upstream: &mut TcpStream, patience: Duration) -> io::Result<()> {
    let (from_agent, to_agent) = agent.split();
    let (from_upstream, to_upstream) = upstream.split();
    let mut up = Way { from: from_agent, to: to_upstream, patience: None };
    let mut down = Way { from: from_upstream, to: to_agent, patience: Some(patience) };
    let (gone, all_heard) = (AtomicBool::new(false), Notify::new());
    let upwards = async {
        match up.run().await {
            Err(Broken::To(_)) => gone.store(true, Ordering::Relaxed),
            ended => return ended,
        }
        tokio::select! {
            thrown_away = up.throw_away() => thrown_away,
            () = async { all_heard.notified().await; tokio::time::sleep(ENDS_WITHIN).await } => Ok(()),
        }
    };
    let downwards = async {
        match down.run().await {
            Err(Broken::From(_)) if gone.load(Ordering::Relaxed) => down.to.shutdown().await.map_err(Broken::To)?,
            ended => ended?,
        }
        all_heard.notify_one();
        Ok(())
    };
    tokio::try_join!(upwards, downwards).map(drop).map_err(Broken::into_error)
}

/// The end that broke.
enum Broken {
    From(io::Error),
    To(io::Error),
}

impl Broken {
    fn into_error(self) -> io::Error {
        match self {
            Broken::From(error) | Broken::To(error) => error,
        }
    }
}

/// One of the two directions.
struct Way<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    /// How long the other end may take nothing.
    patience: Option<Duration>,
}

impl Way<'_> {
    async fn run(&mut self) -> Result<(), Broken> {
        let mut full = 0;
        loop {
            match self.copy().await? {
                0 => break,
                CHUNK => full += 1,
                _ => full = 0,
            }
            if full == LONG {
                full = 0;
                if spliced::hand_on(self).await? {
                    break;
                }
            }
        }
        self.to.shutdown().await.map_err(Broken::To)
    }

    /// Reads to the end, for nobody.
    async fn throw_away(&mut self) -> Result<(), Broken> {
        let mut room = vec![0; CHUNK];
        while self.from.read(&mut room).await.map_err(Broken::From)? > 0 {}
        Ok(())
    }

    /// Copies what is there, and gives how much that was; nothing at the end.
    async fn copy(&mut self) -> Result<usize, Broken> {
        let (from, to) = (&mut self.from, &mut self.to);
        let (length, rest) = poll_fn(|cx| {
            let mut space = [MaybeUninit::uninit(); CHUNK];
            let mut chunk = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut *from).poll_read(cx, &mut chunk)).map_err(Broken::From)?;
            let chunk = chunk.filled();
            if chunk.is_empty() {
                return Poll::Ready(Ok((0, Vec::new())));
            }
            // Mostly it is taken at once: then nothing has to be kept for later.
            let taken = match Pin::new(&mut *to).poll_write(cx, chunk) {
                Poll::Ready(taken) => taken.map_err(Broken::To)?,
                Poll::Pending => 0,
            };
            Poll::Ready(Ok((chunk.len(), chunk[taken..].to_vec())))
        })
        .await?;
        let mut rest = &rest[..];
        while !rest.is_empty() {
            let taken = within(self.patience, self.to.write(rest)).await.map_err(Broken::To)?;
            rest = &rest[taken..];
        }
        Ok(length)
    }
}

async fn within<T>(patience: Option<Duration>, write: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let Some(patience) = patience else { return write.await };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the agent takes nothing");
    tokio::time::timeout(patience, write).await.map_err(late)?
}

#[cfg(target_os = "linux")]
mod spliced {
    use std::io;
    use std::os::fd::OwnedFd;

    use rustix::io::Errno;
    use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
    use tokio::io::Interest;

    use super::{Broken, CHUNK, Way, within};

    /// As much as a pipe holds.
    const PIPE: usize = 64 << 10;
    /// So many short pieces after each other end a long transfer, and its pipe.
    const SHORT: u32 = 16;

    /// Has the kernel hand on what comes, as long as much does; whether that was all there was.
    pub(super) async fn hand_on(way: &mut Way<'_>) -> Result<bool, Broken> {
        // Without descriptors for a pipe, it is copied.
        let Ok((out, into)) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC) else { return Ok(false) };
        let mut short = 0;
        while short < SHORT {
            let length = match fill(way, &into).await {
                Ok(0) => return Ok(true),
                Ok(length) => length,
                // Where a sandbox does not let us. Nothing is in the pipe.
                Err(error) if is_refused(&error) => return Ok(false),
                Err(error) => return Err(Broken::From(error)),
            };
            empty(way, &out, length).await.map_err(Broken::To)?;
            short = if length < CHUNK { short + 1 } else { 0 };
        }
        Ok(false)
    }

    async fn fill(way: &Way<'_>, into: &OwnedFd) -> io::Result<usize> {
        let from = way.from.as_ref();
        from.async_io(Interest::READABLE, || moved(splice(from, None, into, None, PIPE, flags()))).await
    }

    async fn empty(way: &Way<'_>, out: &OwnedFd, mut left: usize) -> io::Result<()> {
        let to = way.to.as_ref();
        while left > 0 {
            let emptied = to.async_io(Interest::WRITABLE, || moved(splice(out, None, to, None, left, flags())));
            left -= within(way.patience, emptied).await?;
        }
        Ok(())
    }

    fn is_refused(error: &io::Error) -> bool {
        [Errno::NOSYS, Errno::PERM, Errno::INVAL].iter().any(|no| error.raw_os_error() == Some(no.raw_os_error()))
    }

    fn flags() -> SpliceFlags {
        SpliceFlags::MOVE | SpliceFlags::NONBLOCK
    }

    fn moved(moved: rustix::io::Result<usize>) -> io::Result<usize> {
        moved.map_err(io::Error::from)
    }
}

#[cfg(not(target_os = "linux"))]
mod spliced {
    use super::{Broken, Way};

    /// Only Linux can.
    pub(super) async fn hand_on(_: &mut Way<'_>) -> Result<bool, Broken> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::set_socket_send_buffer_size;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (here, listener.accept().await.unwrap().0)
    }

    /// Two ends of a tunnel.
    async fn tunnel(patience: Duration) -> (TcpStream, TcpStream, impl Future<Output = io::Result<()>>) {
        let ((agent, mut agent_side), (mut upstream_side, upstream)) = (pair().await, pair().await);
        let pumped = tokio::spawn(async move { pump(&mut agent_side, &mut upstream_side, patience).await });
        (agent, upstream, async { pumped.await.unwrap() })
    }

    #[tokio::test]
    async fn long_and_short_pieces_arrive_whole_and_in_their_order_and_each_side_ends_by_itself() {
        let (mut agent, mut upstream, pumped) = tunnel(Duration::from_secs(60)).await;
        let long: Vec<u8> = (0..6_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let says = async {
            for _ in 0..2 {
                upstream.write_all(&long).await.unwrap();
                for piece in 0..200_u8 {
                    upstream.write_all(&[piece]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
            upstream.shutdown().await.unwrap();
            let mut heard = String::new();
            upstream.read_to_string(&mut heard).await.unwrap();
            heard
        };
        let hears = async {
            let mut heard = Vec::new();
            agent.read_to_end(&mut heard).await.unwrap();
            agent.write_all(b"later").await.unwrap();
            agent.shutdown().await.unwrap();
            heard
        };
        let (said, heard) = tokio::join!(says, hears);
        let pieces: Vec<u8> = (0..200).collect();
        assert!(heard == [&long[..], &pieces, &long, &pieces].concat());
        assert_eq!(said, "later");
        pumped.await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_that_takes_nothing_of_a_long_transfer_is_let_go() {
        let (agent, mut upstream, pumped) = tunnel(Duration::from_millis(100)).await;
        let says = async { while upstream.write_all(&[0; CHUNK]).await.is_ok() {} };
        let ((), ended) = tokio::join!(says, pumped);
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(agent);
    }

    #[tokio::test]
    async fn an_agent_that_still_speaks_to_an_upstream_that_is_gone_hears_all_that_it_said_before() {
        // Little is on its way to the agent: the most of it is still to be handed on.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut agent = socket.connect(listener.local_addr().unwrap()).await.unwrap();
        let mut agent_side = listener.accept().await.unwrap().0;
        set_socket_send_buffer_size(&agent_side, 4096).unwrap();
        let (mut upstream_side, mut upstream) = pair().await;
        let pumped =
            tokio::spawn(async move { pump(&mut agent_side, &mut upstream_side, Duration::from_secs(60)).await });

        let said: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
        agent.write_all(b"unread").await.unwrap();
        upstream.readable().await.unwrap();
        upstream.write_all(&said).await.unwrap();
        // With what it has not read, this is a reset.
        drop(upstream);
        for _ in 0..10 {
            agent.write_all(&[0; CHUNK]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut heard = Vec::new();
        let ended = agent.read_to_end(&mut heard).await;
        assert!(ended.is_ok() && heard == said, "{} of {}, {ended:?}", heard.len(), said.len());
        drop(agent);
        pumped.await.unwrap().unwrap();
    }
}
