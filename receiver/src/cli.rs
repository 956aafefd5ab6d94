//! The command line.

use std::path::PathBuf;

use clap::Parser;
use godwit_control::console::LogArgs;
use godwit_transport::Uri;
use godwit_vmm::HostOptions;
use godwit_vmm::config::SerialTarget;

/// Waits for one virtual machine, takes it in and keeps it running until it ends or is sent onward.
#[derive(Debug, Parser)]
#[command(name = "godwit-receiver", version)]
pub(crate) struct Cli {
    /// Where to listen: tcp://HOST:PORT, quic://HOST:PORT or unix:/PATH; port 0 lets the system choose
    #[arg(long, value_name = "URI")]
    pub(crate) listen: Uri,
    /// Own the machine that comes in but do not run it until `resume`
    #[arg(long)]
    pub(crate) hold: bool,
    /// Allow clear text off loopback
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Where to answer control commands [default: /run/godwit/receiver-PID.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// This host's name towards others [default: its host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) host_id: Option<String>,
    /// What the machine's serial port is connected to here: none, stdio, pty:PATH, unix:PATH, file:PATH
    #[arg(long, value_name = "TARGET", default_value_t = SerialTarget::None)]
    pub(crate) serial: SerialTarget,
    /// A folder from which a kernel may be read again when the guest reboots; may be given several times
    #[arg(long = "boot-dir", value_name = "DIR")]
    boot_dirs: Vec<PathBuf>,
    /// Write events as JSON on stdout, one a line; text for people goes to stderr
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    /// For tests: a CPU feature that this host is to lack
    #[arg(long, hide = true, value_name = "FEATURE")]
    test_without_cpu: Vec<String>,
    /// For tests: a TSC frequency that this host is to have
    #[arg(long, hide = true, value_name = "KHZ")]
    test_tsc_khz: Option<u32>,
}

impl Cli {
    /// What a machine that comes in may use here.
    pub(crate) fn host_options(&self) -> HostOptions {
        HostOptions {
            serial: self.serial.clone(),
            boot_file_dirs: self.boot_dirs.clone(),
            mask_cpu_features: self.test_without_cpu.clone(),
            pretend_tsc_khz: self.test_tsc_khz,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
