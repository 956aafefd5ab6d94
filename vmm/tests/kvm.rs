//! The machine on real KVM. Without /dev/kvm every test is skipped by name; where CI is set and /dev/kvm is there, nothing
//! may be skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod kvm {
    pub(crate) mod balloon;
    pub(crate) mod boot;
    pub(crate) mod devices;
    pub(crate) mod filling;
    pub(crate) mod guests;
    pub(crate) mod moves;
    pub(crate) mod running;
}

use std::env;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

/// A test: its name and what it does. It fails by panicking.
type Test = (&'static str, fn());

fn main() -> ExitCode {
    let there = Path::new("/dev/kvm").exists();
    let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    // Where nothing may be skipped, a /dev/kvm that cannot be used makes the tests fail.
    let must_run = there && env::var("CI").is_ok_and(|ci| ci == "true");
    let skipped = !usable && !must_run;
    let tests = [
        kvm::boot::TESTS,
        kvm::devices::TESTS,
        kvm::running::TESTS,
        kvm::moves::TESTS,
        kvm::balloon::TESTS,
        kvm::filling::TESTS,
    ]
    .concat();
    let trials = tests.into_iter().map(|(name, body)| {
        Trial::test(name, move || {
            body();
            Ok::<_, Failed>(())
        })
        .with_ignored_flag(skipped)
    });
    let mut arguments = Arguments::from_args();
    // Machines share two cores with what measures them: one at a time.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
