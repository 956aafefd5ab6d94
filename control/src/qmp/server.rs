//! Answers QMP clients: one thread reads each client's commands and has them executed, another writes to it.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::line::{Line, LineReader, MAX_LINE_BYTES};
use super::message::{self, Answer, Arguments, ErrorClass, QmpError, Request};
use super::outbox::{Hub, Outbox, QUEUE_LINES};
use super::socket::ControlSocket;

/// Clients at a time; further ones are hung up on.
pub const MAX_CLIENTS: usize = 64;

/// A client that does not take a byte for this long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Pause after a failed accept (out of descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Executes commands. Called from each client's own thread, so from several at once.
pub trait Handler: Send + Sync + 'static {
    /// Executes one command of `caller`. `qmp_capabilities` never gets here.
    fn execute(&self, caller: &Caller, command: &str, arguments: Arguments) -> Answer;
}

/// Who asked for a command.
pub struct Caller {
    stream: UnixStream,
}

impl Caller {
    /// Whether it has hung up, or said that it will send nothing more: what takes long is then not worth going on with.
    pub fn is_gone(&self) -> bool {
        let looked = socket2::SockRef::from(&self.stream)
            .recv_with_flags(&mut [MaybeUninit::uninit()], libc::MSG_PEEK | libc::MSG_DONTWAIT);
        match looked {
            Ok(bytes) => bytes == 0,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }
}

/// A control socket that is being answered. Dropping it ends it and removes the socket's file.
pub struct Server {
    socket: Arc<ControlSocket>,
    clients: Arc<Clients>,
}

impl Server {
    /// Answers the clients of `socket` with `handler`, and gives them `hub`'s events.
    pub fn start(socket: ControlSocket, handler: Arc<dyn Handler>, hub: Hub) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let clients = Arc::new(Clients { hub, handler, connected: Mutex::default() });
        let server = Server { socket: Arc::clone(&socket), clients: Arc::clone(&clients) };
        // The thread holds the listener only, so that dropping the server removes the file.
        let listener = socket.listener.try_clone()?;
        thread::Builder::new().name("qmp-accept".into()).spawn(move || {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => clients.admit(stream),
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
                    Err(error) => {
                        tracing::warn!("control socket: {error}");
                        thread::sleep(ACCEPT_RETRY);
                    }
                }
            }
        })?;
        Ok(server)
    }

    /// How many clients are connected.
    pub fn client_count(&self) -> usize {
        self.clients.connected().len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the accepting thread with EINVAL.
        let _ = socket2::SockRef::from(&self.socket.listener).shutdown(std::net::Shutdown::Both);
        for stream in self.clients.connected().values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Clients {
    hub: Hub,
    handler: Arc<dyn Handler>,
    connected: Mutex<HashMap<u64, UnixStream>>,
}

impl Clients {
    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let Ok(copy) = stream.try_clone() else { return };
        let number = {
            let mut connected = self.connected();
            if connected.len() >= MAX_CLIENTS {
                tracing::warn!("control socket: {MAX_CLIENTS} clients are connected, one more was hung up on");
                return;
            }
            let number = (0..).find(|number| !connected.contains_key(number)).unwrap_or_default();
            connected.insert(number, copy);
            number
        };
        let clients = Arc::clone(self);
        let spawned = thread::Builder::new().name("qmp-client".into()).spawn(move || {
            if let Err(error) = clients.serve(stream) {
                tracing::debug!("control client: {error}");
            }
            clients.connected().remove(&number);
        });
        if let Err(error) = spawned {
            tracing::warn!("control socket: {error}");
            self.connected().remove(&number);
        }
    }

    fn serve(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let hang_up = stream.try_clone()?;
        let outbox = Outbox::new(stream.try_clone()?, QUEUE_LINES, move || {
            let _ = hang_up.shutdown(std::net::Shutdown::Both);
        })?;
        outbox.answer(message::greeting);
        let caller = Caller { stream: stream.try_clone()? };
        let mut session = Session { clients: self, caller, outbox: outbox.clone(), negotiated: false };
        let mut lines = LineReader::new(stream, MAX_LINE_BYTES);
        let result = loop {
            match lines.next_line() {
                Ok(Line::Text(line)) => session.line(&line),
                Ok(Line::TooLong) => {
                    let desc = format!("the line is longer than {MAX_LINE_BYTES} bytes");
                    session.outbox.answer(|| message::response(Err(QmpError::generic(desc)), None));
                }
                Ok(Line::End) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.hub.detach(&outbox);
        result
    }

    fn connected(&self) -> MutexGuard<'_, HashMap<u64, UnixStream>> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One client's conversation.
struct Session<'a> {
    clients: &'a Clients,
    caller: Caller,
    outbox: Outbox,
    negotiated: bool,
}

impl Session<'_> {
    fn line(&mut self, line: &[u8]) {
        let outbox = self.outbox.clone();
        outbox.answer(|| {
            let (answer, id) = match Request::parse(line) {
                Ok(request) => (self.execute(&request.command, request.arguments), request.id),
                Err(bad) => (Err(bad.error), bad.id),
            };
            message::response(answer, id)
        });
    }

    fn execute(&mut self, command: &str, arguments: Arguments) -> Answer {
        match (command, self.negotiated) {
            ("qmp_capabilities", false) => self.negotiate(arguments),
            ("qmp_capabilities", true) => Err(QmpError {
                class: ErrorClass::CommandNotFound,
                desc: "Capabilities negotiation is already complete, command ignored".into(),
            }),
            (_, false) => Err(QmpError {
                class: ErrorClass::CommandNotFound,
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            }),
            (_, true) => self.clients.handler.execute(&self.caller, command, arguments),
        }
    }

    fn negotiate(&mut self, arguments: Arguments) -> Answer {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Capabilities {
            #[serde(default)]
            enable: Vec<String>,
        }
        let wanted: Capabilities = message::arguments("qmp_capabilities", arguments)?;
        if let Some(capability) = wanted.enable.first() {
            return Err(QmpError::generic(format!("QMP capability '{capability}' is not offered")));
        }
        self.negotiated = true;
        self.clients.hub.attach(self.outbox.clone());
        Ok(json!({}))
    }
}
