//! Warnings in a kernel log, and which of them a control run without a move does not have.

use std::collections::BTreeSet;

/// The least bad level that counts: KERN_WARNING.
const WARNING: u8 = 4;

/// What `fw1` has logged in longer control runs: not in each, and the control part of a run is too short to have it every time. An
/// emulated processor is kept from its timer interrupt now and then. Seen without any move 65 s after it had begun, with nobody but a
/// pinger around; the hosts' own kernels log it too (25 ms, as they boot).
const OF_CONTROL_RUNS: [&str; 1] = ["hrtimer: interrupt took 25726354 ns"];

/// One line of level warning or worse that the kernel itself wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// 0 (emergency) to 4 (warning).
    pub level: u8,
    /// Since boot.
    pub at_us: u64,
    /// What it says.
    pub text: String,
}

impl Line {
    /// Reads one record of /dev/kmsg; `None` if it is not a warning or not the kernel's.
    pub fn from_kmsg(record: &str) -> Option<Self> {
        let (head, rest) = record.split_once(';')?;
        let mut fields = head.split(',');
        let priority: u32 = fields.next()?.parse().ok()?;
        let at_us = fields.nth(1)?.parse().ok()?;
        let (facility, level) = (priority >> 3, (priority & 7) as u8);
        // Lines after the first are the record's dictionary. Control characters are escaped by the kernel.
        let text = rest.lines().next().unwrap_or_default().to_owned();
        (facility == 0 && level <= WARNING).then_some(Self { level, at_us, text })
    }

    /// Reads what [`Line`]'s `Display` wrote.
    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = text.splitn(3, ' ');
        let (level, at_us) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Self { level, at_us, text: fields.next()?.to_owned() })
    }
}

/// `text` without what differs from run to run: addresses, counts, times.
fn kind(text: &str) -> String {
    let mut kind = String::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let number = bare.strip_prefix("0x").unwrap_or(bare);
        let has_digit = number.bytes().any(|byte| byte.is_ascii_digit());
        let is_number = has_digit && number.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_number {
            kind.push('#');
            kind.push_str(&word[bare.len()..]);
        } else {
            kind.push_str(word);
        }
    }
    kind
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.level, self.at_us, self.text)
    }
}

/// The lines of `log` the like of which neither `control` nor longer control runs have.
pub fn beyond<'a>(log: &'a [Line], control: &[Line]) -> Vec<&'a Line> {
    let known: BTreeSet<String> = control.iter().map(|line| &*line.text).chain(OF_CONTROL_RUNS).map(kind).collect();
    log.iter().filter(|line| !known.contains(&kind(&line.text))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line { level: 4, at_us: 1, text: text.into() }
    }

    #[test]
    fn only_the_kernels_own_warnings_count() {
        let warning = Line::from_kmsg("4,812,12345,-;clocksource: timekeeping watchdog\n SUBSYSTEM=x\n").unwrap();
        assert_eq!(warning, Line { level: 4, at_us: 12345, text: "clocksource: timekeeping watchdog".into() });
        assert!(Line::from_kmsg("2,1,1,-;I/O error").is_some());
        // Information; systemd's own (facility 3); not a record at all.
        for other in ["6,812,12345,-;virtio_net", "28,5,6,-;systemd warns", "", "x,1,2,-;text", "4;text"] {
            assert_eq!(Line::from_kmsg(other), None, "{other}");
        }
    }

    #[test]
    fn a_line_survives_the_way_over_the_network() {
        let warning = line("rcu: INFO: rcu_preempt detected stalls");
        assert_eq!(Line::parse(&warning.to_string()), Some(warning));
        assert_eq!(Line::parse("4 nonsense"), None);
    }

    #[test]
    fn a_new_warning_is_noticed_and_a_known_one_with_other_numbers_is_not() {
        let control = [line("hpet: lost 7 rtc interrupts at 0xffff8800deadbeef")];
        let known = line("hpet: lost 12 rtc interrupts at 0xffff880012345678");
        let unknown = line("watchdog: BUG: soft lockup - CPU#0 stuck for 23s!");
        let worse = line("hpet: lost some rtc interrupts at 0xffff880012345678");
        let log = [known, unknown.clone(), worse.clone()];
        assert_eq!(beyond(&log, &control), [&unknown, &worse]);
        assert_eq!(beyond(&log, &log), Vec::<&Line>::new());
        let of_longer_control_runs = [line("hrtimer: interrupt took 15091060 ns")];
        assert_eq!(beyond(&of_longer_control_runs, &control), Vec::<&Line>::new());
    }
}
