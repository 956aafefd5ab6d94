//! `cargo xtask simulate`: the simulator (tests/simulator), with faults to be planted built in.

use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Runs the simulator with these options. It alone is built with planted faults; what the other commands build never is.
pub(crate) fn run(options: &[String]) -> Result<ExitCode> {
    let build = ["run", "--quiet", "--package", "godwit-simulator", "--features", "plants", "--"];
    shell::exit_code(shell::cargo().args(build).args(options))
}
