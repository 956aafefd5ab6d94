//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use godwit_control::console::{DEFAULT_NAME, LogArgs, default_control_path};
use godwit_control::units::{Bandwidth, OrNone, Span};
use godwit_core::ownership::Name;
use godwit_vmm::config::ByteSize;
use godwit_vmm::workload::Rate;

use crate::confirm::ConfirmArgs;
use crate::machine_args::MachineArgs;

/// Boots a virtual machine, keeps it running, and sends it to another host while it runs.
#[derive(Debug, Parser)]
#[command(name = "godwit-sender", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) log: LogArgs,
    /// Write events as JSON on stdout, one a line; text for people goes to stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Boot a machine and keep it until it ends or has moved
    Run(Box<RunArgs>),
    /// Look at a machine's claims
    Ownership(OwnershipArgs),
    #[command(flatten)]
    Client(Box<ClientVerb>),
}

/// What is asked of a machine that runs.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientVerb {
    /// Move a machine to where a godwit-receiver listens
    Migrate(MigrateArgs),
    /// Measure the running guest and predict how its move would go; nothing is moved
    Estimate(EstimateArgs),
    /// Tell how a machine is, and its move if there is one
    Status(StatusArgs),
    /// Change the cap or the downtime limit, also of a running move
    Set(SetArgs),
    /// Call a running move off: the guest runs on at the source
    Cancel(ControlArgs),
    /// Let a move go on that waits before the switchover
    Continue(ControlArgs),
    /// Let a running move go over to post-copy: the guest goes on at the destination, and the rest of its memory follows. Until all of it is
    /// there, the guest is lost if either host fails
    Postcopy(ControlArgs),
    /// Pause the guest
    Pause(ControlArgs),
    /// Let a paused guest run on
    Resume(ResumeArgs),
    /// Give up, for good, the copy of a machine of which nobody knows who has it
    Abandon(AbandonArgs),
    /// Announce the guest's addresses on its network interfaces
    Announce(ControlArgs),
    /// Ask the guest to power down
    Powerdown(ControlArgs),
    /// End the process that keeps the machine, and the guest with it
    Quit(ControlArgs),
    /// Print the machine's definition
    Show(ShowArgs),
    /// Steer and check the workload guest
    Guest(GuestArgs),
    /// Let a move go on that a test holds
    #[command(hide = true)]
    Release(ControlArgs),
}

/// Which machine.
#[derive(Debug, Clone, Args)]
pub(crate) struct ControlArgs {
    /// Control socket of the machine [default: /run/godwit/NAME.sock]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Name of the machine
    #[arg(long, conflicts_with = "control", default_value = DEFAULT_NAME)]
    name: String,
}

impl ControlArgs {
    pub(crate) fn path(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(|| default_control_path(&self.name))
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The machine's definition; options win over it
    #[arg(value_name = "MACHINE.toml")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) claims: ClaimArgs,
    /// Where to answer control commands [default: /run/godwit/NAME.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Do not run the guest until `resume`
    #[arg(long)]
    pub(crate) paused: bool,
    /// Let moves that a control client starts go off loopback in clear text
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Write the workload guest as an ELF file that other VMMs boot too, and exit
    #[arg(long, value_name = "FILE")]
    pub(crate) export_elf: Option<PathBuf>,
}

/// Whose a machine is.
#[derive(Debug, Args)]
pub(crate) struct ClaimArgs {
    /// Where the machine's claims lie, a folder that all its hosts share; `none`: there are none [default: beside the first disk that is
    /// written, DISK.godwit; without one, none]
    #[arg(long, value_name = "DIR|none", help_heading = "Ownership")]
    pub(crate) ownership: Option<PathBuf>,
    /// This host's name in claims [default: its machine-id]
    #[arg(long, value_name = "NAME", help_heading = "Ownership")]
    pub(crate) host_id: Option<Name>,
    /// I have made sure that the machine's owner is dead: take it over. With the epoch that a refusal named, only if that one is still
    /// the newest; without, says what it risks, and asks
    #[arg(long, value_name = "EPOCH", num_args = 0..=1, require_equals = true, help_heading = "Ownership")]
    pub(crate) take_ownership: Option<Option<NonZeroU64>>,
    #[command(flatten, next_help_heading = "Ownership")]
    pub(crate) confirm: ConfirmArgs,
}

#[derive(Debug, Args)]
pub(crate) struct OwnershipArgs {
    #[command(subcommand)]
    pub(crate) action: OwnershipAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum OwnershipAction {
    /// Print every claim in a claim directory, the newest last
    Show {
        /// The claim directory
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// Where to: tcp://HOST:PORT, quic://HOST:PORT?fp=sha256:HEX or unix:/PATH, as the receiver printed it
    #[arg(long, value_name = "URI")]
    pub(crate) to: String,
    /// Do the whole preflight and no move
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave the move running and return at once
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) detach: bool,
    /// Cap during the rounds: 1Gbit, 500Mbit, 100M/s, none
    #[arg(long, value_name = "RATE")]
    pub(crate) max_bandwidth: Option<OrNone<Bandwidth>>,
    /// Bandwidth to reckon with in the pause [default: measured]
    #[arg(long, value_name = "RATE")]
    pub(crate) switchover_bandwidth: Option<OrNone<Bandwidth>>,
    /// The longest pause to aim for [default: 300ms]
    #[arg(long, value_name = "TIME")]
    pub(crate) downtime_limit: Option<Span>,
    /// The longest that pausing and sending the rest may take before the source resumes [default: 5s]
    #[arg(long, value_name = "TIME")]
    pub(crate) pause_timeout: Option<Span>,
    /// How long to wait for the destination after the handover [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub(crate) handover_timeout: Option<Span>,
    /// How long a connection that breaks while memory is being sent is made anew for; 0s: a break ends the move [default: 60s]
    #[arg(long, value_name = "TIME")]
    pub(crate) reconnect_timeout: Option<Span>,
    /// Time budget until the pause [default: none]
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<OrNone<Span>>,
    /// Rounds after the first pass before the move counts as stalled [default: 30]
    #[arg(long, value_name = "N")]
    pub(crate) max_rounds: Option<u32>,
    /// What to do as soon as it shows that downtime limit or time budget cannot be met [default: abort]
    #[arg(long, value_name = "ACTION")]
    pub(crate) on_stall: Option<OnStallArg>,
    /// Off: only --timeout and --max-rounds say that a move has stalled, nothing that is predicted; not with --on-stall throttle, which
    /// follows from that [default: on]
    #[arg(long, value_name = "on|off")]
    pub(crate) stall_detection: Option<Switch>,
    /// Wait for `continue` before the guest is paused
    #[arg(long)]
    pub(crate) pause_before_switchover: bool,
    /// Data channels [default: one more than cores, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: Option<u16>,
    /// Send pages without copying them into the socket, where the kernel can (tcp://); where it cannot, the move says so, and copies
    #[arg(long)]
    pub(crate) zero_copy: bool,
    /// Compression of pages: auto, none, zstd, zstd:LEVEL
    #[arg(long, value_name = "HOW")]
    pub(crate) compress: Option<String>,
    /// To a receiver on this host (unix:/PATH): hand the machine's memory over instead of copying it, where it can be (auto), or else be refused (require), or never (off) [default: auto]
    #[arg(long, value_name = "WHEN")]
    pub(crate) memory_handover: Option<MemoryHandoverArg>,
    /// Memory for what was last sent of pages, so that over a slow link only differences are sent; 0: none [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub(crate) delta_cache: Option<ByteSize>,
    /// Compare a hash of every page before the destination loads state [default: on]
    #[arg(long, value_name = "on|off")]
    pub(crate) verify: Option<Switch>,
    /// After the handover, hash the stopped source's memory once more against what was sent
    #[arg(long)]
    pub(crate) audit: bool,
    /// Insist that nothing on shared storage decides whose the machine is: refused if it was started with claims
    #[arg(long, value_name = "none", value_parser = ["none"])]
    pub(crate) ownership: Option<String>,
    /// Allow clear text off loopback
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Write a report of the move: one HTML page with rounds, bytes and the pause as plots
    #[arg(long, value_name = "FILE.html", conflicts_with_all = ["detach", "dry_run"])]
    pub(crate) report: Option<PathBuf>,
    /// For tests: stop on entering this phase until `release`
    #[arg(long, hide = true, value_name = "PHASE")]
    pub(crate) test_hold_at: Option<godwit_core::Phase>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum OnStallArg {
    /// Give up: the guest runs on at the source
    Abort,
    /// Stop the guest all the same and accept the longer pause
    Force,
    /// Hold the vCPUs that write to the highest rate that meets the limits, until the guest stops here
    Throttle,
    /// Let the guest go on at the destination, and send the rest of its memory after it; until all of it is there, the guest is lost if
    /// either host fails
    Postcopy,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum MemoryHandoverArg {
    /// Where it can be done
    Auto,
    /// Or the move is refused
    Require,
    /// Memory is copied
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct EstimateArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// Of the link or the cap, whichever is lower [default: the machine's cap; without one, a table over common links alone]
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// What the link takes in the pause [default: the bandwidth]
    #[arg(long, value_name = "RATE")]
    pub(crate) switchover_bandwidth: Option<OrNone<Bandwidth>>,
    /// The longest pause to aim for [default: 300ms]
    #[arg(long, value_name = "TIME")]
    pub(crate) downtime_limit: Option<Span>,
    /// Time budget until the pause [default: none]
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<OrNone<Span>>,
    /// Rounds after the first pass before the move counts as stalled [default: 30]
    #[arg(long, value_name = "N")]
    pub(crate) max_rounds: Option<u32>,
    /// Compression of pages: auto, none, zstd, zstd:LEVEL
    #[arg(long, value_name = "HOW")]
    pub(crate) compress: Option<String>,
    /// Memory for what was last sent of pages
    #[arg(long, value_name = "SIZE")]
    pub(crate) delta_cache: Option<ByteSize>,
    /// How long to measure
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub(crate) time: Span,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// Follow a running move to its end; the exit code is that of `migrate`
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true)))]
pub(crate) struct SetArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// Cap during the rounds: 1Gbit, 500Mbit, 100M/s, none
    #[arg(long, value_name = "RATE", group = "what")]
    pub(crate) max_bandwidth: Option<OrNone<Bandwidth>>,
    /// The longest pause to aim for
    #[arg(long, value_name = "TIME", group = "what")]
    pub(crate) downtime_limit: Option<Span>,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// After a move that ended unknown: I have made sure that the destination never ran the guest and never will. Says what that risks,
    /// and asks
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) confirm: ConfirmArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AbandonArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    #[command(flatten)]
    pub(crate) confirm: ConfirmArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// As a MACHINE.toml (the only form there is)
    #[arg(long)]
    pub(crate) toml: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    #[command(subcommand)]
    pub(crate) action: GuestAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GuestAction {
    /// Change how many pages it writes per second, over all its vCPUs
    Rate {
        #[command(flatten)]
        control: ControlArgs,
        /// Pages per second, or `max`
        rate: Rate,
    },
    /// Check every page of its memory
    Check(ControlArgs),
    /// Tell how it is doing
    Status(ControlArgs),
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
    fn what_is_left_out_and_what_is_wrong_is_told_apart() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(drop);
        assert!(parse("godwit-sender migrate --to unix:/a --max-bandwidth none --downtime-limit 50ms").is_ok());
        for wrong in ["migrate", "migrate --to unix:/a --channels 0", "migrate --to unix:/a --detach --dry-run", "set"]
        {
            assert!(parse(&format!("godwit-sender {wrong}")).is_err(), "{wrong}");
        }
    }
}
