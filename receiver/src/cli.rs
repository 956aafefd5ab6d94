//! The command line.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use godwit_control::console::LogArgs;
use godwit_core::destination::ClaimOptions;
use godwit_core::ownership::{Host, Name};
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
    /// This host's name towards others and in claims [default: its host name, and its machine-id]
    #[arg(long, value_name = "NAME")]
    pub(crate) host_id: Option<Name>,
    /// What the machine's serial port is connected to here: none, stdio, pty:PATH, unix:PATH, file:PATH
    #[arg(long, value_name = "TARGET", default_value_t = SerialTarget::None)]
    pub(crate) serial: SerialTarget,
    /// A folder from which a kernel may be read again when the guest reboots; may be given several times
    #[arg(long = "boot-dir", value_name = "DIR")]
    boot_dirs: Vec<PathBuf>,
    /// A folder in which a machine's disks may be opened; may be given several times
    #[arg(long = "disk-dir", value_name = "DIR")]
    disk_dirs: Vec<PathBuf>,
    /// Where machines' claims may lie, beside --disk-dir: the claim directory itself, or a folder that has it
    #[arg(long, value_name = "DIR")]
    ownership: Option<PathBuf>,
    /// The file to use here for the disk with this id; may be given several times
    #[arg(long = "map-disk", value_name = "ID=PATH", value_parser = mapping)]
    map_disks: Vec<(String, String)>,
    /// Let disks go through this host's page cache, which may be stale
    #[arg(long)]
    unsafe_cache: bool,
    /// A tap that a machine may use; may be given several times
    #[arg(long = "allow-tap", value_name = "NAME")]
    allow_taps: Vec<String>,
    /// The tap to use here for the network interface with this id; may be given several times
    #[arg(long = "map-net", value_name = "ID=TAP", value_parser = mapping)]
    map_nets: Vec<(String, String)>,
    /// Do not announce the machine on its networks when it runs here: its neighbours find out only when it sends
    #[arg(long)]
    no_announce: bool,
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
    /// Which claim directories may be opened here.
    pub(crate) fn claim_options(&self, host: Host) -> ClaimOptions {
        let beside = self.map_disks.iter().map(|(_, path)| godwit_control::claims::beside(path.as_ref()));
        ClaimOptions {
            host: Arc::new(host),
            allowed: self.disk_dirs.iter().chain(&self.ownership).cloned().collect(),
            own: self.ownership.iter().cloned().chain(beside).collect(),
        }
    }

    /// What a machine that comes in may use here.
    pub(crate) fn host_options(&self) -> HostOptions {
        HostOptions {
            serial: self.serial.clone(),
            boot_file_dirs: self.boot_dirs.clone(),
            disk_dirs: self.disk_dirs.clone(),
            map_disks: self.map_disks.iter().map(|(id, path)| (id.clone(), path.into())).collect(),
            unsafe_cache: self.unsafe_cache,
            allow_taps: self.allow_taps.clone(),
            map_nets: self.map_nets.iter().cloned().collect(),
            no_announce: self.no_announce,
            mask_cpu_features: self.test_without_cpu.clone(),
            pretend_tsc_khz: self.test_tsc_khz,
        }
    }
}

/// Parses what an id stands for here: `ID=NAME`.
fn mapping(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, here)) if !id.is_empty() && !here.is_empty() => Ok((id.to_owned(), here.to_owned())),
        _ => Err("not ID=NAME".into()),
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

    #[test]
    fn what_a_machine_may_use_is_said_name_by_name() {
        let nets = ["--allow-tap", "tap0", "--allow-tap", "tap1", "--map-net", "lan=tap7", "--no-announce"];
        let disks = ["--disk-dir", "/srv/vm", "--disk-dir", "/mnt", "--map-disk", "root=/a=b.img", "--unsafe-cache"];
        let command = ["godwit-receiver", "--listen", "tcp://127.0.0.1:0"].into_iter().chain(nets).chain(disks);
        let options = Cli::try_parse_from(command).unwrap().host_options();
        assert_eq!(options.allow_taps, ["tap0", "tap1"]);
        assert_eq!(options.map_nets, [("lan".into(), "tap7".into())].into());
        assert!(options.no_announce);
        assert_eq!(options.disk_dirs, [PathBuf::from("/srv/vm"), "/mnt".into()]);
        assert_eq!(options.map_disks, [("root".into(), "/a=b.img".into())].into());
        assert!(options.unsafe_cache);
        for wrong in ["lan", "=tap7", "lan="] {
            assert!(mapping(wrong).is_err(), "{wrong}");
        }
    }
}
