//! A running move for people to watch: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use godwit_core::Phase;
use godwit_core::progress::{Progress, RoundReport};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::console::say;
use crate::units::{approximate_bytes, approximate_ms, approximate_rate};

/// Plain lines come this far apart.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// And this far if nothing has changed.
const SAME_LINE_INTERVAL: Duration = Duration::from_secs(30);

/// Shows how a move gets on, on stderr.
pub struct Display {
    /// On a terminal.
    bar: Option<ProgressBar>,
    last_line: Option<(Instant, String)>,
}

impl Display {
    /// A display that shows nothing yet.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg}\n[{bar:40}] {percent:>3} % of this round")
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
            ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr()).with_style(style)
        });
        Display { bar, last_line: None }
    }

    /// The move stands here now.
    pub fn progress(&mut self, progress: &Progress) {
        let text = progress_text(progress);
        if let Some(bar) = &self.bar {
            // Two lines: a terminal of 80 columns shows them whole.
            bar.set_length(progress.total_bytes.max(1));
            bar.set_position(progress.total_bytes.saturating_sub(progress.remaining_bytes));
            bar.set_message(progress_parts(progress).join("\n"));
        } else if self.last_line.as_ref().is_none_or(|(when, last)| when.elapsed() >= interval(*last == text)) {
            say(&text);
            self.last_line = Some((Instant::now(), text));
        }
    }

    /// A round has ended.
    pub fn round(&self, round: &RoundReport) {
        self.line(&format!(
            "round {}: {} sent in {}, {} pages dirty, predicted pause {}",
            round.round,
            approximate_bytes(round.wire_bytes as f64),
            approximate_ms(round.duration_ms),
            round.dirty_pages,
            approximate_ms(round.predicted_pause_ms),
        ));
    }

    /// A line that stays.
    pub fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Default for Display {
    fn default() -> Self {
        Self::new()
    }
}

fn interval(says_the_same: bool) -> Duration {
    if says_the_same { SAME_LINE_INTERVAL } else { LINE_INTERVAL }
}

/// Where a move stands, on one line.
pub fn progress_text(progress: &Progress) -> String {
    let [sending, guest] = progress_parts(progress);
    if guest.is_empty() { sending } else { format!("{sending}, {guest}") }
}

/// What is being sent, and what the guest does and is to expect.
fn progress_parts(progress: &Progress) -> [String; 2] {
    let alone = |text: &str| [text.to_owned(), String::new()];
    let phase = match progress.phase {
        Some(Phase::PreSwitchover) => return alone("pre-switchover: converged, waiting for `continue`"),
        Some(phase) if phase >= Phase::FirstPass => phase,
        Some(phase) => return alone(phase.into()),
        None => return alone("starting"),
    };
    if let Some(reconnecting) = &progress.reconnecting {
        let left = match phase {
            Phase::PostCopyPaused => "for as long as it takes".into(),
            _ => format!("{} left", approximate_ms(reconnecting.time_left_ms)),
        };
        let tried = format!("{phase}, reconnecting: attempt {}, {left}", reconnecting.attempts);
        return [tried, reconnecting.why.clone()];
    }
    if phase == Phase::PostCopy {
        let (left, rate) =
            (approximate_bytes(progress.remaining_bytes as f64), approximate_rate(progress.rate_bytes_per_s));
        let pages = progress.postcopy;
        let sent = format!("pages sent: {} needed, {} ahead of that", pages.by_fault, pages.by_push);
        return [format!("{phase}: {left} left, {rate}"), sent];
    }
    let mut sending = format!(
        "{phase}, round {}: {} left, {}",
        progress.round,
        approximate_bytes(progress.remaining_bytes as f64),
        approximate_rate(progress.rate_bytes_per_s),
    );
    if let Some(cap) = progress.max_bandwidth_bytes_per_s {
        sending += &format!(" (cap {})", approximate_rate(cap as f64));
    }
    let mut guest = Vec::new();
    if progress.dirty_pages_per_s > 0.0 {
        guest.push(format!("guest dirties {:.0} pages/s", progress.dirty_pages_per_s));
    }
    if let Some(pause_ms) = progress.predicted_pause_ms {
        guest.push(format!("predicted pause {}", approximate_ms(pause_ms)));
    }
    if let Some(left_ms) = progress.time_left_ms {
        guest.push(format!("{} to go", approximate_ms(left_ms)));
    }
    [sending, guest.join(", ")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_a_person_wants_to_know() {
        let progress = Progress {
            phase: Some(Phase::Rounds),
            round: 3,
            remaining_bytes: 120 << 20,
            rate_bytes_per_s: 117.6e6,
            dirty_pages_per_s: 30_000.0,
            predicted_pause_ms: Some(4.2),
            time_left_ms: Some(12_345.0),
            max_bandwidth_bytes_per_s: Some(125_000_000),
            ..Progress::default()
        };
        assert_eq!(
            progress_text(&progress),
            "rounds, round 3: 120 MiB left, 941 Mbit/s (cap 1.00 Gbit/s), guest dirties 30000 pages/s, predicted pause \
             4.2 ms, 12.3 s to go"
        );
        assert_eq!(progress_text(&Progress { phase: Some(Phase::Preflight), ..progress }), "preflight");
        assert_eq!(progress_text(&Progress::default()), "starting");
    }
}
