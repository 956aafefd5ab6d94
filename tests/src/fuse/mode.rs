//! What becomes of calls, and of which: chosen by the test, told to the server as a line of text.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is made and answered.
    Normal,
    /// It is made and answered after a while.
    Slow(Duration),
    /// It hangs until the mode changes, and then fares as that says: in [`Mode::Normal`] it is made late, in
    /// [`Mode::Refusing`] never. Only a killed caller is let go, as a hard NFS mount does, and its call is not made.
    Unreachable,
    /// It is not made, and this is its answer.
    Refusing(Errno),
    /// It is made, and this is its answer all the same.
    Unsure(Errno),
    /// It is made, and its answer is held until the mode changes.
    Mute,
}

/// Which calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// Every call, but the closing of files.
    All,
    /// Those that write: what a full or read-only file system refuses.
    Changes,
    /// symlink(2): claims and markers.
    Links,
    /// Reads, writes and flushes of files' contents.
    Data,
    /// fsync(2).
    Flushes,
}

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Looks names, attributes or links up.
    Look,
    /// Makes, removes or alters entries.
    Change,
    /// Makes a symbolic link.
    Link,
    /// Reads contents.
    Read,
    /// Writes contents.
    Write,
    /// Flushes contents to stable storage.
    Flush,
}

/// Which calls misbehave, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Which.
    pub calls: Calls,
    /// How.
    pub mode: Mode,
}

impl Rule {
    /// All is well.
    pub const NORMAL: Self = Self { calls: Calls::All, mode: Mode::Normal };

    /// What becomes of `call`.
    pub fn mode_of(self, call: Call) -> Mode {
        if self.calls.contain(call) { self.mode } else { Mode::Normal }
    }
}

impl Calls {
    fn contain(self, call: Call) -> bool {
        match self {
            Calls::All => true,
            Calls::Changes => matches!(call, Call::Change | Call::Link | Call::Write),
            Calls::Links => call == Call::Link,
            Calls::Data => matches!(call, Call::Read | Call::Write | Call::Flush),
            Calls::Flushes => call == Call::Flush,
        }
    }
}

impl Display for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Calls::All => "all",
            Calls::Changes => "changes",
            Calls::Links => "links",
            Calls::Data => "data",
            Calls::Flushes => "flushes",
        })
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Normal => f.write_str("normal"),
            Mode::Slow(delay) => write!(f, "slow {}", delay.as_millis()),
            Mode::Unreachable => f.write_str("unreachable"),
            Mode::Refusing(errno) => write!(f, "refusing {}", *errno as i32),
            Mode::Unsure(errno) => write!(f, "unsure {}", *errno as i32),
            Mode::Mute => f.write_str("mute"),
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.calls, self.mode)
    }
}

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let (calls, mode) = words.split_first().context("nothing was said")?;
        let calls = match *calls {
            "all" => Calls::All,
            "changes" => Calls::Changes,
            "links" => Calls::Links,
            "data" => Calls::Data,
            "flushes" => Calls::Flushes,
            other => bail!("`{other}` are no calls"),
        };
        let number = |text: &str| text.parse::<u32>().with_context(|| format!("`{text}` is no number"));
        let errno = |text| Ok::<_, anyhow::Error>(Errno::from_raw(number(text)?.try_into()?));
        let mode = match mode {
            ["normal"] => Mode::Normal,
            ["slow", delay_ms] => Mode::Slow(Duration::from_millis(number(delay_ms)?.into())),
            ["unreachable"] => Mode::Unreachable,
            ["refusing", code] => Mode::Refusing(errno(code)?),
            ["unsure", code] => Mode::Unsure(errno(code)?),
            ["mute"] => Mode::Mute,
            other => bail!("`{}` is no mode", other.join(" ")),
        };
        Ok(Self { calls, mode })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_as_text() {
        use Mode::*;
        let modes =
            [Normal, Slow(Duration::from_millis(200)), Unreachable, Refusing(Errno::ENOSPC), Unsure(Errno::EIO), Mute];
        for calls in [Calls::All, Calls::Changes, Calls::Links, Calls::Data, Calls::Flushes] {
            for mode in modes {
                let rule = Rule { calls, mode };
                assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule, "{rule}");
            }
        }
        for nonsense in ["", "all", "all slow", "all slow x", "some normal", "all normal 1"] {
            assert!(nonsense.parse::<Rule>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn only_the_calls_that_are_meant_misbehave() {
        let full = Rule { calls: Calls::Changes, mode: Mode::Refusing(Errno::ENOSPC) };
        assert_eq!(full.mode_of(Call::Link), full.mode);
        assert_eq!(full.mode_of(Call::Look), Mode::Normal);
        assert_eq!(Rule { calls: Calls::Links, ..full }.mode_of(Call::Change), Mode::Normal);
    }
}
