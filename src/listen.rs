//! The sockets that others connect to: TCP and Unix, bound and accepted from in one way.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio_util::either::Either;

/// How long accepting rests when the process has no descriptors left.
const REST: Duration = Duration::from_millis(100);
/// How many connections the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;

/// Where a listener is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix {
        /// Its file.
        path: PathBuf,
        /// Who may connect, as a file's mode.
        mode: u32,
    },
}

impl Place {
    /// The address, where it has one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Place::Tcp(address) => Some(*address),
            Place::Unix { .. } => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What comes of accepting.
pub type Connection = Either<TcpStream, UnixStream>;

/// The address at the other end, where it has one.
pub fn peer(connection: &Connection) -> Option<SocketAddr> {
    match connection {
        Either::Left(stream) => stream.peer_addr().ok(),
        Either::Right(_) => None,
    }
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    place: Place,
    /// Whether the last try to accept failed for want of descriptors.
    short: bool,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// With its file, which goes when it goes.
    Unix {
        socket: UnixListener,
        _file: File,
    },
}

impl Listener {
    /// Binds. The file of a Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// The place is taken, or not ours to take.
    pub async fn bind(place: &Place) -> io::Result<Self> {
        let (socket, place) = match place {
            Place::Tcp(address) => {
                let socket = TcpListener::bind(address).await?;
                let place = Place::Tcp(socket.local_addr()?);
                (Socket::Tcp(socket), place)
            }
            Place::Unix { path, mode } => {
                let (socket, file) = bind_file(path, *mode)?;
                (Socket::Unix { socket, _file: file }, place.clone())
            }
        };
        Ok(Self { socket, place, short: false })
    }

    /// Where it is; a port that was left open is known here.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The next connection. It waits as long as the process has no descriptor for one.
    pub async fn accept(&mut self) -> Connection {
        loop {
            let accepted = match &self.socket {
                Socket::Tcp(socket) => socket.accept().await.map(|(stream, _)| Either::Left(stream)),
                Socket::Unix { socket, .. } => socket.accept().await.map(|(stream, _)| Either::Right(stream)),
            };
            match accepted {
                Ok(connection) => {
                    self.recovered();
                    return prepared(connection);
                }
                // Only this one is lost: it was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => self.rest(&error).await,
            }
        }
    }

    async fn rest(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.short, true) {
            let hint = "raise the limit of open files (`ulimit -n`), or lower `limits.max_connections`";
            tracing::warn!(place = %self.place, %error, hint, "cannot accept connections; said once until it can");
        }
        tokio::time::sleep(REST).await;
    }

    fn recovered(&mut self) {
        if std::mem::take(&mut self.short) {
            tracing::info!(place = %self.place, "connections are accepted again");
        }
    }
}

/// From where a connection comes, and where it was meant to go before a packet filter redirected it here; nothing, where
/// none did.
pub fn redirected(connection: &Connection) -> Option<(SocketAddr, SocketAddr)> {
    let Either::Left(stream) = connection else { return None };
    let (from, here) = (stream.peer_addr().ok()?, stream.local_addr().ok()?);
    // A connection that was not redirected has either no such record, or one that names this very listener.
    original(stream, here).filter(|to| *to != here).map(|to| (from, to))
}

#[cfg(target_os = "linux")]
fn original(stream: &TcpStream, here: SocketAddr) -> Option<SocketAddr> {
    use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
    match here {
        SocketAddr::V4(_) => ip_original_dst(stream).ok().map(SocketAddr::V4),
        // Its scope tells two addresses of one link apart, and would tell one from itself.
        SocketAddr::V6(_) => ipv6_original_dst(stream).ok().map(|to| (*to.ip(), to.port()).into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn original(_: &TcpStream, _: SocketAddr) -> Option<SocketAddr> {
    None
}

/// Small answers go out at once, and a peer that is gone without a word is noticed.
fn prepared(connection: Connection) -> Connection {
    if let Either::Left(stream) = &connection {
        let _ = stream.set_nodelay(true);
        let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
    }
    connection
}

/// The file of a Unix socket, removed with its listener; another one's is left alone.
#[derive(Debug)]
struct File {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for File {
    fn drop(&mut self) {
        if identity(&self.path).is_some_and(|there| Some(there) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn bind_file(path: &Path, mode: u32) -> io::Result<(UnixListener, File)> {
    remove_stale(path)?;
    let socket = UnixSocket::new_stream()?;
    // Before there is a file: it must at no time be open to more than it is to be in the end.
    let _ = rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600));
    socket.bind(path)?;
    let file = File { path: path.to_owned(), identity: identity(path) };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok((socket.listen(BACKLOG)?, file))
}

/// A sidecar that was killed leaves its socket's file behind.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(there) = fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there"));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|there| (there.dev(), there.ino()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn unix(folder: &tempfile::TempDir, mode: u32) -> Place {
        Place::Unix { path: folder.path().join("agent.sock"), mode }
    }

    async fn greets(listener: &mut Listener, path: &Path) {
        let mut here = UnixStream::connect(path).await.unwrap();
        let mut there = listener.accept().await;
        there.write_all(b"hello").await.unwrap();
        let mut read = [0; 5];
        here.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
    }

    #[tokio::test]
    async fn a_socket_is_for_whom_its_mode_lets_in_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        for mode in [0o600, 0o666] {
            let mut listener = Listener::bind(&unix(&folder, mode)).await.unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
            greets(&mut listener, &path).await;
            assert_eq!(listener.place().to_string(), format!("unix:{}", path.display()));
            drop(listener);
            assert!(!path.exists());
        }
    }

    #[tokio::test]
    async fn a_file_that_a_killed_sidecar_left_is_replaced_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let (place, path) = (unix(&folder, 0o600), folder.path().join("agent.sock"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let mut listener = Listener::bind(&place).await.unwrap();
        greets(&mut listener, &path).await;
        assert_eq!(Listener::bind(&place).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // Whoever looked whether somebody is there.
        drop(listener.accept().await);
        greets(&mut listener, &path).await;
        // Whatever stands there when it goes is not its own any more.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody's").unwrap();
        drop(listener);
        assert_eq!(Listener::bind(&place).await.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    }
}
