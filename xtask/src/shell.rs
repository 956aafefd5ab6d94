//! Running other programs.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// Cargo, in the workspace's root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command that must succeed.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("{} ended with {status}", describe(command));
    }
    Ok(())
}

/// Runs a command and makes its success or failure ours.
pub(crate) fn exit_code(command: &mut Command) -> Result<ExitCode> {
    Ok(match status(command)?.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) => ExitCode::from(code),
        None => ExitCode::FAILURE,
    })
}

/// Runs a command that must succeed and gives what it wrote to stdout.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run {}", describe(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}", describe(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} did not write text", describe(command)))
}

/// Runs a command, showing what it writes as it comes, and gives its end and both outputs together.
pub(crate) fn show_and_capture(command: &mut Command) -> Result<(ExitStatus, String)> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (from_stdout, from_stderr) = thread::scope(|scope| {
        let errors = scope.spawn(|| copy_lines(stderr, std::io::stderr()));
        (copy_lines(stdout, std::io::stdout()), errors.join().unwrap_or_default())
    });
    Ok((child.wait()?, from_stdout + &from_stderr))
}

fn copy_lines(from: Option<impl Read>, mut to: impl Write) -> String {
    let mut copy = String::new();
    for line in from.into_iter().flat_map(|from| BufReader::new(from).lines()).map_while(Result::ok) {
        // A closed terminal must not end the run.
        let _ = writeln!(to, "{line}");
        copy.push_str(&line);
        copy.push('\n');
    }
    copy
}

fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("cannot run {}", describe(command)))
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}
