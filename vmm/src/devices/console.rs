//! What a serial port is connected to on the host, and the thread that brings input in.
//!
//! Output never makes a vCPU wait for long: what a terminal or socket does not take at once, and what standard output does not
//! take within a moment, is dropped, as on a real line without flow control.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{mem, ptr};

use vmm_sys_util::eventfd::EventFd;

use super::serial::{UartInput, eventfd};
use crate::config::SerialTarget;
use crate::error::VmmError;
use crate::sync::lock;

/// How long standard output may make a vCPU wait for each piece of output.
const STDOUT_PATIENCE: Duration = Duration::from_millis(100);

/// A console.
pub(super) struct Console {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// A path that exists only as long as the console does.
    path: Option<PathBuf>,
}

struct Shared {
    line: Line,
    /// Interrupts the thread's wait.
    wake: EventFd,
    /// Whether input is taken in; held while it is.
    accepting: Mutex<bool>,
    stopping: AtomicBool,
}

/// The two directions of a console.
enum Line {
    None,
    Stdio,
    /// The master, and the other end: held open so that the master does not hang up when nobody is connected.
    Pty {
        master: File,
        _slave: OwnedFd,
    },
    Unix {
        listener: UnixListener,
        client: Mutex<Option<UnixStream>>,
    },
    File(File),
}

impl Console {
    /// Connects to `target`.
    pub(super) fn open(target: &SerialTarget) -> Result<Self, VmmError> {
        let failed = || VmmError::os(format!("cannot connect the serial port to {target}"));
        let (line, path) = match target {
            SerialTarget::None => (Line::None, None),
            SerialTarget::Stdio => (Line::Stdio, None),
            SerialTarget::File(path) => {
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(failed())?;
                (Line::File(file), None)
            }
            SerialTarget::Unix(path) => (listen(path).map_err(failed())?, Some(path.clone())),
            SerialTarget::Pty(path) => (pty(path).map_err(failed())?, Some(path.clone())),
        };
        let shared = Shared { line, wake: eventfd()?, accepting: Mutex::new(false), stopping: AtomicBool::new(false) };
        Ok(Self { shared: Arc::new(shared), thread: Mutex::new(None), path })
    }

    /// Where the port's output goes.
    pub(super) fn output(&self) -> Output {
        Output(Arc::clone(&self.shared))
    }

    /// To be written when the port has room again.
    pub(super) fn wake(&self) -> &EventFd {
        &self.shared.wake
    }

    /// Starts to bring input to `uart`.
    pub(super) fn feed(&self, uart: Arc<UartInput>) -> Result<(), VmmError> {
        if !self.shared.line.has_input() {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name("serial".into())
            .spawn(move || shared.bring_input(&uart))
            .map_err(VmmError::os("cannot start the serial port's thread"))?;
        *lock(&self.thread) = Some(thread);
        Ok(())
    }

    /// Opens or closes the gate for input.
    pub(super) fn accept_input(&self, accept: bool) {
        *lock(&self.shared.accepting) = accept;
        self.shared.wake();
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake();
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the serial port's thread panicked");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop();
        if let Some(path) = &self.path {
            // It may have been taken away already.
            let _ = fs::remove_file(path);
        }
    }
}

/// The port's output.
#[derive(Clone)]
pub(crate) struct Output(Arc<Shared>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = match &self.0.line {
            Line::None => Ok(()),
            Line::Stdio if !writable_soon(libc::STDOUT_FILENO) => Ok(()),
            Line::Stdio => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
            Line::Pty { master, .. } => (&*master).write_all(bytes),
            Line::File(file) => (&*file).write_all(bytes),
            Line::Unix { client, .. } => lock(client).as_ref().map_or(Ok(()), |mut client| client.write_all(bytes)),
        };
        match result {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Line {
    fn has_input(&self) -> bool {
        !matches!(self, Line::None | Line::File(_))
    }
}

impl Shared {
    fn wake(&self) {
        // Fails only if the counter is full: then it is readable anyway.
        let _ = self.wake.write(1);
    }

    /// The thread: waits for input while it is wanted and there is room for it.
    fn bring_input(&self, uart: &UartInput) {
        let mut open = true;
        while !self.stopping.load(Ordering::Acquire) {
            let wanted = open && *lock(&self.accepting) && uart.room() > 0;
            let ready = self.wait(wanted);
            // Whatever it was, it is looked at now.
            let _ = self.wake.read();
            if ready {
                open = self.take_in(uart);
            }
        }
    }

    /// Waits for a wake-up or, if wanted, input. Whether there is input.
    fn wait(&self, input_wanted: bool) -> bool {
        let client = self.client();
        let input = match &self.line {
            Line::Stdio => Some(libc::STDIN_FILENO),
            Line::Pty { master, .. } => Some(master.as_raw_fd()),
            Line::Unix { listener, .. } => Some(client.as_ref().map_or(listener.as_raw_fd(), AsRawFd::as_raw_fd)),
            Line::None | Line::File(_) => None,
        };
        let input = input.filter(|_| input_wanted);
        poll_two(self.wake.as_raw_fd(), input)
    }

    /// Takes in what fits, unless the gate has closed meanwhile. False: there will be no more.
    fn take_in(&self, uart: &UartInput) -> bool {
        let accepting = lock(&self.accepting);
        if !*accepting {
            return true;
        }
        let mut buffer = [0; 64];
        let room = uart.room().min(buffer.len());
        let result = match &self.line {
            Line::Stdio => io::stdin().lock().read_unbuffered(&mut buffer[..room]),
            Line::Pty { master, .. } => (&*master).read(&mut buffer[..room]),
            Line::Unix { listener, client } => {
                return self.take_in_from_socket(listener, client, uart, &mut buffer[..room]);
            }
            Line::None | Line::File(_) => return false,
        };
        match result {
            Ok(0) => false,
            Ok(count) => {
                uart.receive(&buffer[..count]);
                true
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Accepts a client, or reads from the one there is. One that has hung up makes room for the next.
    fn take_in_from_socket(
        &self,
        listener: &UnixListener,
        client: &Mutex<Option<UnixStream>>,
        uart: &UartInput,
        buffer: &mut [u8],
    ) -> bool {
        let read = {
            let mut client = lock(client);
            let Some(stream) = &mut *client else {
                if let Ok((stream, _)) = listener.accept() {
                    *client = stream.set_nonblocking(true).is_ok().then_some(stream);
                }
                return true;
            };
            match stream.read(buffer) {
                Ok(count) if count > 0 => count,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                _ => {
                    *client = None;
                    0
                }
            }
        };
        // Without the client: a vCPU that writes holds the port and waits for the client.
        uart.receive(&buffer[..read]);
        true
    }

    /// A handle of the present client's own, to wait on without holding the lock that output needs.
    fn client(&self) -> Option<UnixStream> {
        match &self.line {
            Line::Unix { client, .. } => lock(client).as_ref().and_then(|stream| stream.try_clone().ok()),
            _ => None,
        }
    }
}

/// Reading past the process-wide buffer: what is not taken must stay readable for poll.
trait ReadUnbuffered {
    fn read_unbuffered(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

impl ReadUnbuffered for io::StdinLock<'_> {
    fn read_unbuffered(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let fd: BorrowedFd<'_> = self.as_fd();
        // SAFETY: the descriptor is open as long as the lock is held and the buffer is as long as stated.
        let count = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

/// Waits until one of two descriptors is readable; whether the second one is.
fn poll_two(wake: RawFd, input: Option<RawFd>) -> bool {
    let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // A negative descriptor is not looked at.
    let mut entries = [entry(wake), entry(input.unwrap_or(-1))];
    // SAFETY: the array is as long as stated and lives through the call.
    let count = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, -1) };
    count > 0 && entries[1].revents != 0
}

/// Waits until a descriptor takes output, for a moment.
fn writable_soon(fd: RawFd) -> bool {
    let until = Instant::now() + STDOUT_PATIENCE;
    loop {
        let mut entry = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
        let left = until.saturating_duration_since(Instant::now());
        // SAFETY: one entry, which lives through the call.
        match unsafe { libc::poll(&mut entry, 1, left.as_millis() as libc::c_int) } {
            // Interrupted, for example by a kick.
            -1 if !left.is_zero() => {}
            count => return count > 0,
        }
    }
}

fn listen(path: &Path) -> io::Result<Line> {
    if UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
        // Left behind by a process that has ended.
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(Line::Unix { listener, client: Mutex::new(None) })
}

/// A new pseudo-terminal in raw mode, with `path` as a symbolic link to it.
fn pty(path: &Path) -> io::Result<Line> {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: the two descriptors are written to; no name, settings or size are passed.
    if unsafe { libc::openpty(&mut master, &mut slave, ptr::null_mut(), ptr::null(), ptr::null()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both have just been opened and nobody else owns them.
    let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    for fd in [master.as_raw_fd(), slave.as_raw_fd()] {
        // SAFETY: changes the flag of an open descriptor.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: changes the flags of an open descriptor.
    if unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    make_raw(&slave)?;
    let name = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    if fs::symlink_metadata(path).is_ok_and(|there| there.is_symlink()) {
        fs::remove_file(path)?;
    }
    std::os::unix::fs::symlink(name, path)?;
    Ok(Line::Pty { master, _slave: slave })
}

fn make_raw(terminal: &OwnedFd) -> io::Result<()> {
    let fd = terminal.as_raw_fd();
    // SAFETY: termios is plain data, for which zeros are valid; the descriptor is open and the structure lives through the
    // calls.
    let result = unsafe {
        let mut settings: libc::termios = mem::zeroed();
        match libc::tcgetattr(fd, &mut settings) {
            0 => {
                libc::cfmakeraw(&mut settings);
                libc::tcsetattr(fd, libc::TCSANOW, &settings)
            }
            error => error,
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
