//! A move that has ended, as a small table for people.

use crate::outcome::{HandoverCost, Outcome, OutcomeKind};
use crate::units::{approximate_bytes, approximate_ms, approximate_rate};

/// The lines of the table; the last one says what state the guest is in, and where.
pub fn summary(outcome: &Outcome) -> Vec<String> {
    let mut lines = Vec::new();
    // Without a first pass there is nothing to show.
    if !outcome.round_reports.is_empty() {
        table(outcome, &mut lines);
    }
    for reason in &outcome.reasons {
        let label = match outcome.outcome {
            OutcomeKind::Refused => "refused",
            _ => "reason",
        };
        lines.push(format!("{label}: {reason}"));
    }
    lines.push(outcome.headline());
    lines
}

fn table(outcome: &Outcome, lines: &mut Vec<String>) {
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<22} {value}"));
    row("total", approximate_ms(outcome.total_ms));
    if let Some(downtime_ms) = outcome.downtime_ms {
        row("downtime", precise_ms(downtime_ms));
        for step in &outcome.steps {
            row(&format!("  {}", step.end), format!("{:>10}  {}", precise_ms(step.duration_ms), step.name));
        }
    }
    if let Some(cost) = &outcome.handover {
        row("handover", handover(cost));
    }
    if let Some(bytes) = outcome.handed_over_bytes {
        row("memory handed over", format!("{bytes} bytes, 0 copied"));
    }
    row("rounds", outcome.rounds.to_string());
    let mean = outcome.wire_bytes as f64 * 1000.0 / outcome.total_ms.max(1.0);
    row(
        "on the wire",
        format!("{} ({} on average)", approximate_bytes(outcome.wire_bytes as f64), approximate_rate(mean)),
    );
    let pages = outcome.pages;
    row(
        "pages",
        format!(
            "{} raw, {} compressed, {} as differences, {} unchanged, {} zero, {} never touched",
            pages.raw, pages.zstd, pages.delta, pages.same, pages.zero, pages.untouched
        ),
    );
    if let Some(postcopy) = &outcome.postcopy {
        row(
            "post-copy",
            format!(
                "{} pages were missing, all there after {}: {} sent when needed, {} ahead of that",
                postcopy.missing_pages,
                approximate_ms(postcopy.duration_ms),
                postcopy.pages_by_fault,
                postcopy.pages_by_push
            ),
        );
        row(
            "page faults",
            format!(
                "{}: half within {} µs, 99 % within {} µs, the slowest {} µs",
                postcopy.faults, postcopy.fault_p50_us, postcopy.fault_p99_us, postcopy.fault_max_us
            ),
        );
    }
    if !outcome.reconnections.is_empty() {
        let (breaks, away) =
            (outcome.reconnections.len(), outcome.reconnections.iter().filter_map(|cut| cut.outage_ms));
        let times = if breaks == 1 { "once".to_owned() } else { format!("{breaks} times") };
        let again = approximate_bytes(outcome.resent_bytes as f64);
        row("connection", format!("broke {times}, away for {}, {again} sent again", approximate_ms(away.sum())));
    }
    if let Some(audit) = &outcome.audit {
        row("audit", audit.clone());
    }
}

fn handover(cost: &HandoverCost) -> String {
    let HandoverCost { claim_ms, marker_ms, locks_ms, total_ms } = *cost;
    format!(
        "{} of the downtime: claim {}, marker {} (not waited for), locks {} (overlapping)",
        precise_ms(total_ms),
        precise_ms(claim_ms),
        precise_ms(marker_ms),
        precise_ms(locks_ms)
    )
}

fn precise_ms(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.2} ms") } else { approximate_ms(ms) }
}

#[cfg(test)]
mod tests {
    use godwit_core::Refusal;
    use godwit_core::progress::{Report, RoundReport, Step};
    use godwit_core::source::SourceOutcome;

    use super::*;

    #[test]
    fn the_pause_is_shown_step_by_step_and_the_guest_last() {
        let report = Report {
            total_ms: 1234.5,
            downtime_ms: Some(4.25),
            wire_bytes: 1 << 30,
            rounds: vec![RoundReport::default()],
            steps: vec![
                Step { end: "source", name: "pause the vCPUs".into(), duration_ms: 0.5 },
                Step { end: "destination", name: "claim".into(), duration_ms: 0.2 },
            ],
            ..Report::default()
        };
        let lines = summary(&Outcome::new(1, "unix:/tmp/b", &SourceOutcome::Moved(report), "paused"));
        assert!(lines.iter().any(|line| line.contains("downtime") && line.contains("4.25 ms")), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("0.50 ms  pause the vCPUs")), "{lines:?}");
        assert!(
            lines.iter().any(|line| line.contains("handover") && line.contains("claim 0.20 ms, marker")),
            "{lines:?}"
        );
        assert!(lines.last().is_some_and(|line| line.contains("unix:/tmp/b")), "{lines:?}");
    }

    #[test]
    fn every_reason_of_a_refusal_has_its_own_line() {
        let refusals = vec![Refusal::new("cpu", "no avx2"), Refusal::new("tsc", "slower")];
        let lines = summary(&Outcome::new(1, "unix:/tmp/b", &SourceOutcome::Refused(refusals), "running"));
        assert_eq!(lines[..2], ["refused: cpu: no avx2", "refused: tsc: slower"]);
        assert!(lines[2].contains("still here, running"));
    }
}
