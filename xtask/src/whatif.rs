//! `cargo xtask whatif`: predicts moves of machines that nobody has at hand (tests/src/bin/whatif.rs).

use std::process::ExitCode;

use anyhow::Result;

use crate::shell;

/// Runs the predictor with these options.
pub(crate) fn run(options: &[String]) -> Result<ExitCode> {
    let run = ["run", "--quiet", "--package", "godwit-tests", "--bin", "whatif", "--"];
    shell::exit_code(shell::cargo().args(run).args(options))
}
