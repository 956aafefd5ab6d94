//! The control link of either end in life: a thread that reads, one that says "still here", and a shared writer.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::channel::{Channel, ChannelReader, ChannelWriter, HangUp};
use crate::memory_files::MAX_FILES;
use crate::message::{Message, MessageError};
use crate::priority::run_promptly;
use crate::sync::lock;

/// How often an end says that it is still here.
pub const PING_INTERVAL: Duration = Duration::from_secs(1);

/// Why a link has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEnd {
    /// It broke, or the peer closed it.
    Broken(String),
    /// What the peer sent is no message.
    Nonsense(String),
}

/// The writing side of a control link; cheap to clone. The threads end when the last clone is gone or it is hung up.
#[derive(Clone)]
pub struct ControlLink {
    shared: Arc<Shared>,
    _pinger: Arc<mpsc::Sender<()>>,
}

struct Shared {
    writer: Mutex<Box<dyn ChannelWriter>>,
    hang_up: Arc<dyn HangUp>,
    started: Instant,
    last_heard_ns: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    /// Files that have come with messages, and that nobody has taken.
    files: Mutex<Vec<OwnedFd>>,
}

impl ControlLink {
    /// Starts the threads. `hear` is called by the reading thread with every message but pings and, once, with why
    /// the link ended.
    pub fn start(
        channel: Channel,
        mut hear: impl FnMut(Result<Message, LinkEnd>) + Send + 'static,
    ) -> io::Result<Self> {
        let Channel { reader, writer, hang_up, .. } = channel;
        let shared = Arc::new(Shared {
            writer: Mutex::new(writer),
            hang_up,
            started: Instant::now(),
            last_heard_ns: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            files: Mutex::default(),
        });
        let listening = Arc::clone(&shared);
        thread::Builder::new().name("control-read".into()).spawn(move || {
            let _prompt = run_promptly();
            let mut reader = Listening { reader, shared: listening };
            loop {
                let read = Message::read(&mut reader);
                reader.keep_files();
                match read {
                    Ok(Message::Ping(())) => {}
                    Ok(message) => hear(Ok(message)),
                    Err(MessageError::Io(error)) => return hear(Err(LinkEnd::Broken(error.to_string()))),
                    Err(error) => return hear(Err(LinkEnd::Nonsense(error.to_string()))),
                }
            }
        })?;
        let (pinger, stop) = mpsc::channel();
        let pinging = Arc::clone(&shared);
        thread::Builder::new().name("control-ping".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(PING_INTERVAL) {
                if pinging.send(&Message::Ping(())).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { shared, _pinger: Arc::new(pinger) })
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        self.shared.send(message)
    }

    /// Whether files can be passed on over it.
    pub fn passes_files(&self) -> bool {
        self.shared.writer().passes_files()
    }

    /// Sends a message and passes `files` on with it.
    pub fn send_with_files(&self, message: &Message, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.shared.send_with(message, |writer, frame| writer.write_all_with_files(frame, files))
    }

    /// The files that have come with messages and were not taken yet. Those that come with a message are there when it is heard.
    pub fn take_files(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut lock(&self.shared.files))
    }

    /// Lets what was sent be delivered, then ends the writing side.
    pub fn finish(&self) {
        if let Err(error) = self.shared.writer().finish() {
            tracing::debug!("cannot finish the control channel: {error}");
        }
    }

    /// Breaks the link.
    pub fn hang_up(&self) {
        self.shared.hang_up.hang_up();
    }

    /// How long nothing has been heard from the peer.
    pub fn silence(&self) -> Duration {
        let last = Duration::from_nanos(self.shared.last_heard_ns.load(Ordering::Relaxed));
        self.shared.started.elapsed().saturating_sub(last)
    }

    /// Bytes in both directions.
    pub fn wire_bytes(&self) -> u64 {
        self.shared.sent_bytes.load(Ordering::Relaxed) + self.shared.received_bytes.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn send(&self, message: &Message) -> io::Result<()> {
        self.send_with(message, |writer, frame| writer.write_all(frame))
    }

    fn send_with(
        &self,
        message: &Message,
        write: impl FnOnce(&mut dyn ChannelWriter, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let frame = message.encode().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let mut writer = self.writer();
        write(&mut **writer, &frame)?;
        self.sent_bytes.store(writer.bytes_on_wire(), Ordering::Relaxed);
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, Box<dyn ChannelWriter>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes when bytes come in, and how many.
struct Listening {
    reader: Box<dyn ChannelReader>,
    shared: Arc<Shared>,
}

impl Listening {
    /// Keeps what has come along; a peer that passes on more than there is use for finds it closed.
    fn keep_files(&mut self) {
        let mut files = lock(&self.shared.files);
        files.extend(self.reader.take_files());
        files.truncate(MAX_FILES);
    }
}

impl io::Read for Listening {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection"));
        }
        let now = self.shared.started.elapsed().as_nanos() as u64;
        self.shared.last_heard_ns.store(now, Ordering::Relaxed);
        self.shared.received_bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
