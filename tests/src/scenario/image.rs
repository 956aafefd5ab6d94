//! A disk image checked after its machine was powered off, with e2fsprogs, where the image lies.

use anyhow::{Context, Result, bail, ensure};

use crate::scenario::record::RECORDS_FILE;

/// What a command on another host did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// Whether a file system is in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fsck {
    /// Nothing to complain about.
    Clean,
    /// What e2fsck said.
    Errors(String),
}

/// Has `e2fsck -fn` check an image. `run` runs a command where the image lies.
pub fn check_file_system(image: &str, run: impl FnOnce(&[&str]) -> Result<Output>) -> Result<Fsck> {
    let output = run(&["e2fsck", "-f", "-n", image])?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), output.stderr);
    match output.code {
        0 => Ok(Fsck::Clean),
        4 => Ok(Fsck::Errors(said.trim().to_owned())),
        code => bail!("e2fsck {image} ended with {code}: {}", said.trim()),
    }
}

/// Reads the records from an image without mounting it.
pub fn read_records(image: &str, run: impl FnOnce(&[&str]) -> Result<Output>) -> Result<Vec<u8>> {
    let output = run(&["debugfs", "-R", &format!("cat {RECORDS_FILE}"), image])?;
    ensure!(output.code == 0, "debugfs {image} ended with {}: {}", output.code, output.stderr.trim());
    // Its exit code is 0 even where there is no such file; the first line names its version.
    let complaint = output.stderr.lines().find(|line| !line.starts_with("debugfs ") && !line.trim().is_empty());
    match complaint {
        Some(complaint) => bail!("debugfs {image}: {complaint}"),
        None => Ok(output.stdout),
    }
}

/// Runs a command on this machine.
pub fn run_here(command: &[&str]) -> Result<Output> {
    let (program, arguments) = command.split_first().context("an empty command")?;
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let code = output.status.code().with_context(|| format!("{program} ended with {}", output.status))?;
    Ok(Output { code, stdout: output.stdout, stderr: String::from_utf8_lossy(&output.stderr).into_owned() })
}
