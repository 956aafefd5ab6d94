//! The kinds of faults.

use strum::{Display, EnumMessage, VariantArray};

/// What is done to a move. The names are those that are printed; the first line of each is what `--list` says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Display, VariantArray, EnumMessage)]
#[strum(serialize_all = "kebab-case")]
pub enum Kind {
    /// the process that has the machine is killed (SIGKILL)
    KillSource,
    /// the receiver is killed (SIGKILL)
    KillDestination,
    /// the process that has the machine is stopped for a while (SIGSTOP, SIGCONT)
    StopSource,
    /// the receiver is stopped for a while (SIGSTOP, SIGCONT)
    StopDestination,
    /// the link between the hosts is down for a while
    LinkDown,
    /// a part of all packets is lost in both directions for a while
    PacketLoss,
    /// all packets in one direction are lost for a while, those in the other arrive
    HalfOpen,
    /// the source cannot reach the claim store for a while: its calls hang
    StoreUnreachableSource,
    /// the destination cannot reach the claim store for a while: its calls hang
    StoreUnreachableDestination,
    /// the source's calls to the claim store take effect for a while, but their answers are lost
    StoreUncertainSource,
    /// the destination's calls to the claim store take effect for a while, but their answers are lost
    StoreUncertainDestination,
    /// the claim store answers late to both for a while
    StoreSlow,
    /// the claim store has no space for a while (ENOSPC), at either end
    FullDisk,
    /// the move is called off
    Cancel,
    /// the command that asked for the move is killed; the move goes on without it
    KillClient,
}

/// What a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Whether either process lives. After two deaths there would be nothing to be seen.
    Life,
    /// Whether the source runs.
    SourceTime,
    /// Whether the destination runs.
    DestinationTime,
    /// The link.
    Link,
    /// The claim store.
    Store,
    /// The move, by a command.
    Command,
    /// The client.
    Client,
}

impl Kind {
    /// All of them.
    pub fn all() -> &'static [Kind] {
        Kind::VARIANTS
    }

    /// What it is, in one line.
    pub fn what(self) -> &'static str {
        self.get_documentation().unwrap_or_default()
    }

    /// What it strikes. Two faults of one move never strike the same: one's end would heal the other.
    pub fn target(self) -> Target {
        match self {
            Kind::KillSource | Kind::KillDestination => Target::Life,
            Kind::StopSource => Target::SourceTime,
            Kind::StopDestination => Target::DestinationTime,
            Kind::LinkDown | Kind::PacketLoss | Kind::HalfOpen => Target::Link,
            Kind::Cancel => Target::Command,
            Kind::KillClient => Target::Client,
            _ => Target::Store,
        }
    }

    /// Whether there is nothing to be healed after it.
    pub fn is_instant(self) -> bool {
        matches!(self.target(), Target::Life | Target::Command | Target::Client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_and_one_line() {
        for kind in Kind::all() {
            assert!(!kind.what().is_empty() && !kind.what().contains('\n'), "{kind}");
        }
        assert_eq!(Kind::StoreUncertainDestination.to_string(), "store-uncertain-destination");
    }
}
