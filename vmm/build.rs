//! Builds the workload guest: the bare-metal image that `godwit_vmm::workload` embeds.
//!
//! The compiler and the linker that build the library build it too; it needs no other toolchain.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    match build_guest() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            for line in reason.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build_guest() -> Result<(), String> {
    let target = variable("TARGET")?;
    if target != TARGET {
        return Err(format!(
            "godwit-vmm is built for {TARGET} (asked for: {target}): it runs x86-64 guests on Linux KVM"
        ));
    }
    let compiler = variable("RUSTC")?;
    let linker = env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".to_owned());
    let image = PathBuf::from(variable("OUT_DIR")?).join("workload-guest.elf");
    // From the guest's own folder, so that no path of the building machine gets into the image.
    let output = Command::new(&compiler)
        .current_dir(PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("guest"))
        .args(["--edition=2024", "--crate-name=workload_guest", "--crate-type=bin", "--target", TARGET])
        .args(["-Copt-level=3", "-Cpanic=abort", "-Ccodegen-units=1", "-Cstrip=symbols"])
        .args(["-Crelocation-model=static", "-Ccode-model=small", "-Crelro-level=off"])
        .args(["-Clinker-features=-lld", &format!("-Clinker={linker}")])
        .args(["-nostartfiles", "-nostdlib", "-static", "-no-pie"].map(|option| format!("-Clink-arg={option}")))
        .args(
            ["-T,linker.ld", "--build-id=none", "-z,max-page-size=4096", "-z,noseparate-code"]
                .map(|option| format!("-Clink-arg=-Wl,{option}")),
        )
        .arg("-o")
        .arg(&image)
        .arg("main.rs")
        .output()
        .map_err(|error| format!("cannot run {compiler} to build the workload guest: {error}"))?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the workload guest does not build ({compiler}, {}):\n{messages}", output.status));
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("cargo's variable {name}: {error}"))
}
