//! Reads everything that is logged at trace level, and every panic, for what must not be there.

use std::io::{self, Write};
use std::panic;
use std::sync::{LazyLock, Mutex, Once, PoisonError};

use tracing::Dispatch;
use tracing::instrument::{WithDispatch, WithSubscriber};
use tracing::subscriber::NoSubscriber;
use tracing_subscriber::fmt::MakeWriter;

/// What every secret of every world begins with.
pub const CANARY: &str = "canary-";
/// The same in base64, where it stands as it does in Basic credentials.
pub const ENCODED: &str = "Y2FuYXJ5";

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static LEAKS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static QUIET: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::default()));

/// Starts reading, once for the process.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let every_line = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
        every_line.with_writer(Reader).init();
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // A failed assertion of a test is no panic of the product.
            if !info.location().is_some_and(|place| place.file().starts_with("tests/")) {
                lock(&PANICS).push(info.to_string());
            }
            usual(info);
        }));
    });
}

/// The product's own lines that hold this text.
pub fn lines_with(text: &str) -> Vec<String> {
    lock(&LINES).iter().filter(|line| line.contains(text)).cloned().collect()
}

/// Whatever should not have been: lines with a canary, and panics outside of the tests.
pub fn offences() -> Vec<String> {
    lock(&LEAKS).iter().chain(lock(&PANICS).iter()).cloned().collect()
}

/// A task of the test's own side, of whose log nothing is read: it knows the secrets.
pub fn unread<F: Future>(task: F) -> WithDispatch<F> {
    task.with_subscriber(QUIET.clone())
}

/// Spawns hyper's tasks unread, too.
#[derive(Clone)]
pub struct Unread;

impl<F> hyper::rt::Executor<F> for Unread
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        tokio::spawn(unread(task));
    }
}

struct Reader;

impl<'a> MakeWriter<'a> for Reader {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for Reader {
    /// Takes one event: the formatter writes each at once.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(event);
        if line.contains(CANARY) || line.contains(ENCODED) {
            lock(&LEAKS).push(format!("logged: {line}"));
        }
        if line.contains(" sidebearer::") {
            lock(&LINES).push(line.into_owned());
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
