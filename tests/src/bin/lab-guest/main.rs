//! Runs inside the lab's machine `fw1` and answers its clients (`godwit_tests::scenario::guest` says what): writes
//! records, tells the time and the kernel's warnings, and watches the clocks. On the lab's hosts it has two more jobs: with
//! `clock-server` it only answers what is asked about the host's clocks, with `claim-race` it races for claims.

mod files;
mod kmsg;
mod race;
mod steps;

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::anyhow;
use godwit_tests::scenario::guest::{DONE, PORT, request};
use godwit_tests::scenario::record::RECORDS_FILE;
use nix::time::{ClockId, clock_gettime};

use self::files::Files;
use self::steps::Watch;

const USAGE: &str = "usage: lab-guest [clock-server | claim-race DIRECTORY SECONDS | DIRECTORY]";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        [] => serve_guest(Path::new(RECORDS_FILE).parent().unwrap_or(Path::new("/"))),
        ["clock-server"] => Server::default().serve().map_err(Into::into),
        ["claim-race", directory, seconds] => match seconds.parse() {
            Ok(seconds) => race::run(Path::new(directory), Duration::from_secs(seconds)),
            Err(error) => Err(anyhow!("`{seconds}` is not a number of seconds: {error}")),
        },
        [directory] if !directory.starts_with('-') => serve_guest(&PathBuf::from(directory)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve_guest(directory: &Path) -> anyhow::Result<()> {
    Ok(Server::in_guest(directory)?.serve()?)
}

#[derive(Default)]
struct Server {
    /// Only in the guest.
    guest: Option<Guest>,
}

struct Guest {
    files: Files,
    watch: Arc<Watch>,
}

impl Server {
    fn in_guest(directory: &Path) -> io::Result<Self> {
        Ok(Self { guest: Some(Guest { files: Files::open(directory)?, watch: Watch::start()? }) })
    }

    fn serve(self) -> io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        let server = Arc::new(self);
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    let server = server.clone();
                    thread::spawn(move || server.answer(stream));
                }
                Err(error) => {
                    eprintln!("lab-guest: cannot accept: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
        Ok(())
    }

    /// Answers one client until it goes.
    fn answer(&self, stream: TcpStream) {
        let answered = stream.set_nodelay(true).and_then(|()| self.answer_all(&stream));
        if let Err(error) = answered {
            eprintln!("lab-guest: {error}");
        }
    }

    fn answer_all(&self, mut stream: &TcpStream) -> io::Result<()> {
        for line in BufReader::new(stream.try_clone()?).lines() {
            let line = line?;
            let (what, number) = line.split_once(' ').unwrap_or((&line, ""));
            let answer = match (what, &self.guest) {
                (request::RECORDS, Some(guest)) => return guest.files.write_records(stream),
                (request::CLOCK, _) => clocks(),
                (request::KLOG, _) => kmsg::warnings(),
                (request::BOOT_ID, _) => {
                    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().into())
                }
                (request::STEPS, Some(guest)) => Ok(guest.watch.answer()),
                (request::WRITE, Some(guest)) => guest.files.write_contents(number).map(|()| DONE.into()),
                (request::CHECK, Some(guest)) => guest.files.check_contents(number).map(|()| DONE.into()),
                (request::USE_MEMORY, Some(_)) => files::use_memory(number).map(|()| DONE.into()),
                (request::REBOOT, Some(_)) => reboot().map(|()| DONE.into()),
                _ => Err(io::Error::other(format!("unknown request `{line}`"))),
            };
            let answer = answer.unwrap_or_else(|error| format!("error: {error}"));
            stream.write_all(format!("{answer}\n").as_bytes())?;
        }
        Ok(())
    }
}

/// Asks systemd, which answers before it begins.
fn reboot() -> io::Result<()> {
    let status = Command::new("systemctl").args(["--no-block", "reboot"]).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("systemctl ended with {status}"))) }
}

fn clocks() -> io::Result<String> {
    let read = |id| Ok::<_, io::Error>(Duration::from(clock_gettime(id)?).as_nanos());
    let realtime_ns = read(ClockId::CLOCK_REALTIME)?;
    let monotonic_ns = read(ClockId::CLOCK_MONOTONIC)?;
    let boottime_ns = read(ClockId::CLOCK_BOOTTIME)?;
    Ok(format!("{realtime_ns} {monotonic_ns} {boottime_ns}"))
}
