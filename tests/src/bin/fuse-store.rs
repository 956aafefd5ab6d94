//! Serves a folder through a FUSE mount that misbehaves on demand: the process behind `godwit_tests::fuse::FuseStore`.
//!
//! It is told what to do on stdin, a line each, and answers each line. When stdin ends, its owner is gone: it unmounts and ends.

use std::env;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use godwit_tests::fuse::gate::Gate;
use godwit_tests::fuse::mode::Rule;
use godwit_tests::fuse::passthrough;
use nix::mount::{MntFlags, umount2};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

fn main() -> Result<()> {
    let folders: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [backing, mountpoint] = &folders[..] else { anyhow::bail!("usage: fuse-store BACKING MOUNTPOINT") };
    // Whoever stopped us may be killed: then we go on, to see that nobody is left.
    set_pdeathsig(Signal::SIGCONT)?;
    let gate = Gate::new();
    let session = match passthrough::serve(backing, mountpoint, gate.clone()) {
        Ok(session) => session,
        Err(error) => return say(Err(anyhow::Error::from(error).context(format!("{}", mountpoint.display())))),
    };
    say(Ok(String::new()))?;
    for line in io::stdin().lock().lines() {
        say(obey(&gate, &line.context("cannot read a command")?))?;
    }
    // Whoever hangs in it is let go by our end.
    let detached = umount2(mountpoint, MntFlags::MNT_DETACH);
    drop(session);
    detached.with_context(|| format!("cannot unmount {}", mountpoint.display()))
}

fn obey(gate: &Gate, command: &str) -> Result<String> {
    if command == "held" {
        return Ok(gate.held().to_string());
    }
    gate.set(command.parse::<Rule>()?);
    Ok(String::new())
}

fn say(answer: Result<String>) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match answer {
        Ok(text) => writeln!(stdout, "ok {text}"),
        Err(error) => writeln!(stdout, "error {error:#}"),
    }?;
    stdout.flush().context("nobody listens")
}
