//! `cargo xtask test`: builds everything, runs every test under nextest and the documentation's examples, and adds up.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::totals::{self, Totals};
use crate::{deps, shell};

/// What nextest answers when tests ran and some failed.
const NEXTEST_TESTS_FAILED: i32 = 100;

/// The tests that need planted faults: they are built apart, so that nothing else has any.
const PLANTED: [&str; 7] =
    ["--package", "godwit-simulator", "--features", "plants", "--test", "plants", "--no-tests=pass"];

pub(crate) fn run(names: &[String]) -> Result<ExitCode> {
    deps::require(&["cargo-nextest"])?;
    // End-to-end tests start the binaries, which nextest alone would not build.
    shell::check(shell::cargo().args(["build", "--workspace", "--bins", "--tests"]))?;

    let list = shell::output(
        shell::cargo()
            .args(["nextest", "list", "--workspace", "--run-ignored", "all", "--message-format", "json"])
            .args(names),
    )?;
    let mut skipped = totals::ignored_tests(&list)?;
    let (code_tests, planted) = (run_nextest(&["--workspace"], names)?, run_nextest(&PLANTED, names)?);
    let documented = run_doc_tests(names)?;
    skipped.extend(documented.1);
    let totals = Totals { skipped: skipped.len(), ..code_tests + planted + documented.0 };

    Ok(conclude(totals, &skipped))
}

fn run_nextest(which: &[&str], names: &[String]) -> Result<Totals> {
    let (status, output) = shell::show_and_capture(shell::cargo().args(["nextest", "run"]).args(which).args(names))?;
    if !status.success() && status.code() != Some(NEXTEST_TESTS_FAILED) {
        bail!("the tests did not run: nextest ended with {status}");
    }
    totals::from_nextest_summary(&output)
}

fn run_doc_tests(names: &[String]) -> Result<(Totals, Vec<String>)> {
    let command = ["test", "--workspace", "--doc", "--no-fail-fast", "--"];
    let (status, output) = shell::show_and_capture(shell::cargo().args(command).args(names))?;
    let (totals, ignored) = totals::from_doc_tests(&output);
    if !status.success() && totals.failed == 0 {
        bail!("the documentation's examples did not run: cargo ended with {status}");
    }
    Ok((totals, ignored))
}

/// Says what was skipped and the totals, and decides whether that is good enough.
fn conclude(totals: Totals, skipped: &[String]) -> ExitCode {
    println!();
    for name in skipped {
        println!("skipped: {name}");
    }
    let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    let has_kvm = Path::new("/dev/kvm").exists();
    let skips_fail = in_ci && has_kvm && totals.skipped > 0;
    if totals.skipped > 0 && !has_kvm {
        println!("this machine has no /dev/kvm: the tests that move real guests were skipped");
    }
    if skips_fail {
        println!("CI=true and this machine has /dev/kvm: a skipped test counts as a failure of the run");
    }
    println!("{totals}");
    if totals.failed > 0 || skips_fail { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
