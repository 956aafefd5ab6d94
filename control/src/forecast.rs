//! A prediction for people to read: a short table of rounds and a verdict in plain sentences.

use godwit_core::PAGE_SIZE;
use godwit_core::predict::{Band, Forecast, PredictedRound, Row, Throttle};

use crate::units::{approximate_bytes, approximate_ms, approximate_rate};

/// Of many rounds, so many are shown at the beginning, and the last.
const ROUNDS_SHOWN: usize = 8;

/// Each round: what it sends, how long that takes, what is dirty then, and what the pause would be.
pub fn rounds_text(rounds: &[PredictedRound]) -> String {
    let mut lines =
        vec![format!("{:>6}  {:>10}  {:>10}  {:>12}  {:>12}", "round", "sent", "takes", "then dirty", "pause then")];
    for (index, round) in rounds.iter().enumerate() {
        if index == ROUNDS_SHOWN && index + 1 < rounds.len() {
            lines.push(format!("{:>6}  … {} more …", "", rounds.len() - 1 - index));
        }
        if index >= ROUNDS_SHOWN && index + 1 < rounds.len() {
            continue;
        }
        lines.push(format!(
            "{index:>6}  {:>10}  {:>10}  {:>12}  {:>12}",
            approximate_bytes(round.wire_bytes),
            time_text(round.seconds),
            approximate_bytes(round.dirty_pages * PAGE_SIZE as f64),
            time_text(round.pause_seconds),
        ));
    }
    lines.join("\n")
}

/// Whether it converges, what it costs, and how far from the border it is. `dirty_bytes_per_s`: what the guest writes now.
pub fn verdict_text(forecast: &Forecast, downtime_limit_ms: f64, dirty_bytes_per_s: f64) -> String {
    let Forecast { total_s, pause_ms, wire_bytes, rounds, margin, .. } = forecast;
    let rate = |share: f64| format!("{}/s", approximate_bytes(dirty_bytes_per_s * share));
    let mut text = match forecast.converges {
        true => format!(
            "It converges: {} after the first pass, {} in all, {} over the link, a pause of {} (limit {}).",
            rounds_word(rounds.len().saturating_sub(1)),
            band_text(*total_s, time_text),
            band_text(*wire_bytes, approximate_bytes),
            band_text(*pause_ms, approximate_ms),
            approximate_ms(downtime_limit_ms),
        ),
        false => format!(
            "It does not converge: {}. After {} and {} it would be given up. The shortest pause within reach is {}.",
            forecast.why.as_deref().unwrap_or("the limits are not met"),
            band_text(*total_s, time_text),
            band_text(*wire_bytes, approximate_bytes),
            approximate_ms(forecast.shortest_pause_ms),
        ),
    };
    match (forecast.converges, margin) {
        (true, None) => text.push_str(" However fast it wrote to these pages, it would still converge."),
        (true, Some(margin)) => {
            text.push_str(&format!(" The guest could write {margin:.2} times as fast ({}).", rate(*margin)));
        }
        (false, Some(margin)) if *margin > 0.0 => {
            text.push_str(&format!(" Held to {} ({margin:.2} of its rate) it would converge.", rate(*margin)));
        }
        (false, _) => text.push_str(" No lower write rate changes that: raise the limit, the budget or the bandwidth."),
    }
    if let Some(Throttle { share, pages_per_s, bytes_per_s }) = forecast.throttle {
        text.push_str(&format!(
            " --on-stall throttle would hold it to {pages_per_s:.0} page writes/s ({}/s, {share:.2} of its rate) from within the first pass on.",
            approximate_bytes(bytes_per_s)
        ));
    }
    if forecast.border {
        text.push_str(" That is close to the border: it may turn out the other way.");
    }
    text
}

/// A line for each bandwidth, a column for each downtime limit: the time it takes, and the pause.
pub fn table_text(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let mut head = format!("{:>12}", "link");
    for cell in &first.cells {
        head.push_str(&format!("  {:>20}", format!("limit {}", approximate_ms(cell.downtime_limit_ms))));
    }
    head.push_str(&format!("  {:>14}", "shortest pause"));
    let mut lines = vec![head];
    for row in rows {
        let mut line = format!("{:>12}", approximate_rate(row.bandwidth_bytes_per_s));
        for cell in &row.cells {
            let text = match cell.converges {
                true => format!("{}, {}", time_text(cell.total_s), approximate_ms(cell.pause_ms)),
                false => "does not".to_owned(),
            };
            line.push_str(&format!("  {text:>20}"));
        }
        line.push_str(&format!("  {:>14}", approximate_ms(row.shortest_pause_ms)));
        lines.push(line);
    }
    lines.join("\n")
}

fn rounds_word(rounds: usize) -> String {
    match rounds {
        0 => "no round".into(),
        1 => "one round".into(),
        rounds => format!("{rounds} rounds"),
    }
}

/// The value, and its band where that says more.
fn band_text(band: Band, text: impl Fn(f64) -> String) -> String {
    let (low, likely, high) = (text(band.low), text(band.likely), text(band.high));
    match low == high {
        true => likely,
        false => format!("{likely} ({low} to {high})"),
    }
}

fn time_text(seconds: f64) -> String {
    match seconds {
        _ if seconds < 300.0 => approximate_ms(seconds * 1e3),
        _ if seconds < 3.0 * 3600.0 => format!("{:.1} min", seconds / 60.0),
        _ if seconds < 72.0 * 3600.0 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forecast(converges: bool, margin: Option<f64>) -> Forecast {
        let same = |likely| Band { low: likely, likely, high: likely };
        let round =
            PredictedRound { pages: 1e3, wire_bytes: 4.1e6, seconds: 0.5, dirty_pages: 100.0, pause_seconds: 0.02 };
        Forecast {
            converges,
            border: margin.is_some_and(|margin| (0.9..1.1).contains(&margin)),
            margin,
            throttle: margin.filter(|margin| (0.01..1.0).contains(margin)).map(|share| Throttle {
                share,
                pages_per_s: share * 1000.0,
                bytes_per_s: share * 4_096_000.0,
            }),
            why: (!converges).then(|| "30 rounds were not enough".into()),
            total_s: same(2.0),
            pause_ms: Band { low: 18.0, likely: 20.0, high: 23.0 },
            wire_bytes: same(5e9),
            rounds: vec![round; 12],
            shortest_pause_ms: 15.0,
        }
    }

    #[test]
    fn a_verdict_says_what_it_costs_and_how_near_the_border_is() {
        let text = verdict_text(&forecast(true, Some(1.05)), 300.0, 1e6);
        assert!(
            text.starts_with("It converges: 11 rounds after the first pass, 2000 ms in all, 4.7 GiB over the link")
        );
        assert!(text.contains("20.0 ms (18.0 ms to 23.0 ms)") && text.contains("close to the border"), "{text}");
        let text = verdict_text(&forecast(false, Some(0.5)), 300.0, 1048576.0);
        assert!(text.contains("30 rounds were not enough") && text.contains("Held to 512 KiB/s (0.50"), "{text}");
        assert!(text.contains("throttle would hold it to 500 page writes/s (2.0 MiB/s, 0.50 of its rate)"), "{text}");
        assert!(verdict_text(&forecast(false, Some(0.0)), 1.0, 1e6).contains("raise the limit"));
    }

    #[test]
    fn many_rounds_are_shown_in_part() {
        let text = rounds_text(&forecast(true, None).rounds);
        assert_eq!(text.lines().count(), 1 + 8 + 1 + 1, "{text}");
        assert!(text.contains("3 more"));
    }
}
