//! What programs have in common towards their user: lines on stdout and stderr, logging, where the socket is.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use tracing_subscriber::filter::LevelFilter;

use crate::qmp::Hub;
use crate::qmp::outbox::{Outbox, QUEUE_LINES};

/// Where control sockets are by default.
pub const CONTROL_DIRECTORY: &str = "/run/godwit";

/// The name of a machine that was given none.
pub const DEFAULT_NAME: &str = "machine";

/// Exit code: an internal error.
pub const EXIT_INTERNAL: u8 = 1;

/// Exit code: the command line cannot be meant.
pub const EXIT_USAGE: u8 = 2;

/// Exit code: the machine may not be started or moved, and nothing was done.
pub const EXIT_REFUSED: u8 = 3;

/// Exit code: the machine is another's by the claims; what was here of it has been dropped.
pub const EXIT_LOST: u8 = 7;

/// A line for programs, on stdout. That nobody reads it is no error.
pub fn out(line: impl Display) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// A line for people, on stderr.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The default control socket of the machine `name`.
pub fn default_control_path(name: &str) -> PathBuf {
    Path::new(CONTROL_DIRECTORY).join(format!("{name}.sock"))
}

/// Writes every event of `hub` on stdout (`--json`). If stdout is not read, events are lost, nothing waits.
pub fn events_to_stdout(hub: &Hub) -> io::Result<()> {
    hub.attach(Outbox::new(io::stdout(), QUEUE_LINES, || ())?);
    Ok(())
}

/// Options about logging.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Say more about what happens, on stderr (twice: everything)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Append the log to FILE instead of stderr
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
}

impl LogArgs {
    /// Starts logging.
    pub fn start(&self) -> io::Result<()> {
        let level = match self.verbose {
            0 if self.log_file.is_some() => LevelFilter::INFO,
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        let builder = tracing_subscriber::fmt().with_max_level(level).with_target(false);
        match &self.log_file {
            Some(path) => builder.with_ansi(false).with_writer(open_log(path)?).init(),
            None => builder.with_ansi(false).with_writer(io::stderr).init(),
        }
        Ok(())
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot open the log file {}: {error}", path.display())))
}

/// This host's name.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "unnamed host".into(),
        name => name.into(),
    }
}
