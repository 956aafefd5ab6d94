//! The figures of a report: what of a move is shown, and how.

use godwit_core::PAGE_SIZE;
use godwit_core::predict::{Band, Forecast};
use maud::{Markup, PreEscaped, html};

use super::charts::{Axes, Line, Role, bars, lines, scatter};
use super::page::figure;
use super::{MoveReport, ReportError, SuiteReport};
use crate::outcome::{Outcome, StepTime};
use crate::units::{approximate_bytes, approximate_ms};

const MIB: f64 = (1 << 20) as f64;
/// The guest's rate is shown over spans of so many samples: one alone is uneven.
const SAMPLES_IN_SPAN: usize = 5;

/// All figures of one move.
pub(super) fn of_move(report: &MoveReport<'_>) -> Result<Markup, ReportError> {
    let outcome = report.outcome;
    Ok(html! {
        section.figures {
            @if !outcome.round_reports.is_empty() {
                (remaining(report)?)
                (bytes_per_round(report)?)
                (rates(report)?)
            }
            @if !outcome.steps.is_empty() { (pause(report)) }
            @if report.writes.len() > SAMPLES_IN_SPAN { (guest(report)?) }
            @if let Some(forecast) = report.forecast { (compared(report, forecast)) }
        }
        @if !outcome.round_reports.is_empty() { (rounds(outcome)) }
    })
}

/// What all moves of a suite show together.
pub(super) fn of_suite(report: &SuiteReport<'_>) -> Result<Markup, ReportError> {
    let converged = || report.moves.iter().map(|(one, _)| one).filter(|one| one.outcome.downtime_ms.is_some());
    let both = |predicted: fn(&Forecast) -> f64, measured: fn(&MoveReport<'_>) -> Option<f64>| -> Vec<(f64, f64)> {
        let pair = |one: &MoveReport<'_>| Some((predicted(one.forecast?), measured(one)?));
        converged().filter_map(pair).collect()
    };
    let totals = both(|forecast| forecast.total_s.likely, |one| Some(one.outcome.total_ms / 1e3));
    let pauses = both(|forecast| forecast.pause_ms.likely, |one| one.gap_ms);
    let bytes = both(|forecast| forecast.wire_bytes.likely / MIB, |one| Some(one.outcome.wire_bytes as f64 / MIB));
    let legend = [(Role::Measured.class(), "a move"), (Role::Limit.class(), "as predicted")];
    let chart = |title: &str, unit: &str, points: &[(f64, f64)]| -> Result<Markup, ReportError> {
        let (x, y) = (format!("predicted, {unit}"), format!("measured, {unit}"));
        Ok(figure(title, &legend, &PreEscaped(scatter(&Axes { x: &x, y: &y, whole: false }, points)?)))
    };
    Ok(html! {
        section.figures {
            (chart("Total time", "s", &totals)?)
            (chart("Pause", "ms", &pauses)?)
            (chart("Bytes over the link", "MiB", &bytes)?)
        }
    })
}

fn remaining(report: &MoveReport<'_>) -> Result<Markup, ReportError> {
    let outcome = report.outcome;
    let before = setup_ms(outcome) / 1e3;
    let measured = sawtooth(
        before,
        outcome
            .round_reports
            .iter()
            .map(|round| (round.pages_sent as f64, round.duration_ms / 1e3, round.dirty_pages as f64)),
    );
    let mut all = vec![Line { role: Role::Measured, dashed: false, marks: false, points: measured }];
    let mut legend = vec![(Role::Measured.class(), "measured")];
    if let Some(forecast) = report.forecast {
        let in_rounds: f64 = forecast.rounds.iter().map(|round| round.seconds).sum();
        let pause = if forecast.converges { forecast.pause_ms.likely / 1e3 } else { 0.0 };
        let before = (forecast.total_s.likely - pause - in_rounds).max(0.0);
        let points =
            sawtooth(before, forecast.rounds.iter().map(|round| (round.pages, round.seconds, round.dirty_pages)));
        all.push(Line { role: Role::Predicted, dashed: true, marks: false, points });
        legend.push((Role::Predicted.class(), "predicted"));
    }
    let chart = lines(&Axes { x: "seconds since the request", y: "MiB still to be sent", whole: false }, &all)?;
    Ok(figure("Remaining", &legend, &PreEscaped(chart)))
}

/// Each round begins with what it has to send, ends with nothing of that left, and finds what was dirtied meanwhile.
fn sawtooth(before_s: f64, rounds: impl Iterator<Item = (f64, f64, f64)>) -> Vec<(f64, f64)> {
    let mib = |pages: f64| pages * PAGE_SIZE as f64 / MIB;
    let mut points = Vec::new();
    let mut at_s = before_s;
    for (pages, seconds, dirty_pages) in rounds {
        points.push((at_s, mib(pages)));
        at_s += seconds;
        points.extend([(at_s, 0.0), (at_s, mib(dirty_pages))]);
    }
    points
}

fn bytes_per_round(report: &MoveReport<'_>) -> Result<Markup, ReportError> {
    let measured = report.outcome.round_reports.iter().map(|round| round.wire_bytes as f64 / MIB).collect();
    let mut groups = vec![(Role::Measured, measured)];
    let mut legend = vec![(Role::Measured.class(), "measured")];
    if let Some(forecast) = report.forecast {
        groups.push((Role::Predicted, forecast.rounds.iter().map(|round| round.wire_bytes / MIB).collect()));
        legend.push((Role::Predicted.class(), "predicted"));
    }
    let chart = bars(&Axes { x: "round (0: the first pass)", y: "MiB on the wire", whole: true }, &groups)?;
    Ok(figure("Bytes per round", &legend, &PreEscaped(chart)))
}

fn rates(report: &MoveReport<'_>) -> Result<Markup, ReportError> {
    let rounds = &report.outcome.round_reports;
    let per_s = |value: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
        let rate = |index: usize| value(index) / MIB / (rounds[index].duration_ms / 1e3).max(1e-6);
        (0..rounds.len())
            .filter(|index| rounds[*index].duration_ms > 1.0)
            .map(|index| (index as f64, rate(index)))
            .collect()
    };
    let dirtied = per_s(&|index| (rounds[index].dirty_pages * PAGE_SIZE as u64) as f64);
    let sent = per_s(&|index| rounds[index].wire_bytes as f64);
    let last = (rounds.len() as f64 - 1.0).max(1.0);
    let mut all = vec![
        Line { role: Role::Guest, dashed: false, marks: true, points: dirtied },
        Line { role: Role::Measured, dashed: false, marks: true, points: sent },
    ];
    let mut legend = vec![(Role::Guest.class(), "dirty when it ended"), (Role::Measured.class(), "sent")];
    if let Some(cap) = report.bandwidth_bytes_per_s {
        all.push(Line {
            role: Role::Limit,
            dashed: true,
            marks: false,
            points: vec![(0.0, cap / MIB), (last, cap / MIB)],
        });
        legend.push((Role::Limit.class(), "cap"));
    }
    let chart = lines(&Axes { x: "round (0: the first pass)", y: "MiB per second of the round", whole: true }, &all)?;
    Ok(figure("Dirty rate against bandwidth", &legend, &PreEscaped(chart)))
}

/// Steps one under the other, each as long as it took. Steps of the destination lie within what the source waits for.
fn pause(report: &MoveReport<'_>) -> Markup {
    let steps = &report.outcome.steps;
    let longest = steps.iter().fold(1e-9, |longest: f64, step| longest.max(step.duration_ms));
    let class = |step: &StepTime| if step.end == "source" { Role::Measured.class() } else { Role::Guest.class() };
    let legend = [(Role::Measured.class(), "source"), (Role::Guest.class(), "destination, meanwhile")];
    let contents = html! {
        ol.steps {
            @for step in steps {
                li {
                    span.name { (step.name) }
                    span.bar { i class=(class(step)) style=(format!("width:{:.2}%", 100.0 * step.duration_ms / longest)) {} }
                    span.value { (precise_ms(step.duration_ms)) }
                }
            }
        }
        p.note {
            @if let Some(downtime_ms) = report.outcome.downtime_ms { "In all " (precise_ms(downtime_ms)) ". " }
            @if let Some(gap_ms) = report.gap_ms { "The guest's heartbeat stood still for " (precise_ms(gap_ms)) ". " }
            @if let Some(limit_ms) = report.downtime_limit_ms { "The limit was " (precise_ms(limit_ms)) "." }
        }
    };
    figure("The pause, step by step", &legend, &contents)
}

fn guest(report: &MoveReport<'_>) -> Result<Markup, ReportError> {
    let spans = report.writes.windows(SAMPLES_IN_SPAN + 1).step_by(SAMPLES_IN_SPAN);
    let rate = |span: &[(f64, u64)]| match span {
        [(began, before), .., (ended, after)] if ended > began => {
            Some(((began + ended) / 2e3, after.saturating_sub(*before) as f64 / (ended - began)))
        }
        _ => None,
    };
    let points = spans.filter_map(rate).filter(|(at_s, _)| *at_s >= 0.0).collect();
    let line = Line { role: Role::Guest, dashed: false, marks: false, points };
    let chart = lines(&Axes { x: "seconds since the request", y: "thousand pages per second", whole: false }, &[line])?;
    Ok(figure(
        "What the guest writes",
        &[(Role::Guest.class(), "by its own count, wherever it runs")],
        &PreEscaped(chart),
    ))
}

fn compared(report: &MoveReport<'_>, forecast: &Forecast) -> Markup {
    let outcome = report.outcome;
    let band = |band: Band, text: &dyn Fn(f64) -> String| match text(band.low) == text(band.high) {
        true => text(band.likely),
        false => format!("{} ({} to {})", text(band.likely), text(band.low), text(band.high)),
    };
    let ms = |seconds: f64| approximate_ms(seconds * 1e3);
    let pause_ms = report.gap_ms.or(outcome.downtime_ms);
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let rows = [
        ("converges", yes(forecast.converges), yes(outcome.downtime_ms.is_some())),
        ("total", band(forecast.total_s, &ms), approximate_ms(outcome.total_ms)),
        ("pause", band(forecast.pause_ms, &precise_ms), pause_ms.map_or("none".into(), precise_ms)),
        ("bytes", band(forecast.wire_bytes, &approximate_bytes), approximate_bytes(outcome.wire_bytes as f64)),
        ("rounds", forecast.rounds.len().saturating_sub(1).to_string(), outcome.rounds.to_string()),
        (
            "could write",
            forecast.margin.map_or("however fast".into(), |margin| format!("{margin:.2} times as fast")),
            String::new(),
        ),
    ];
    let contents = html! {
        table.compared {
            thead { tr { th {} th { "predicted" } th { "measured" } } }
            tbody { @for (name, predicted, measured) in rows { tr { th { (name) } td { (predicted) } td { (measured) } } } }
        }
    };
    figure("Predicted and measured", &[], &contents)
}

fn rounds(outcome: &Outcome) -> Markup {
    html! {
        details {
            summary { "Every round in numbers" }
            div.wide {
                table {
                    thead { tr { @for name in ["round", "took", "pages", "on the wire", "then dirty", "pause then"] { th { (name) } } } }
                    tbody {
                        @for round in &outcome.round_reports {
                            tr {
                                td { (round.round) }
                                td { (precise_ms(round.duration_ms)) }
                                td { (round.pages_sent) }
                                td { (approximate_bytes(round.wire_bytes as f64)) }
                                td { (round.dirty_pages) }
                                td { (precise_ms(round.predicted_pause_ms)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Before the first pass: what the rounds and the pause leave of the total.
fn setup_ms(outcome: &Outcome) -> f64 {
    let rounds: f64 = outcome.round_reports.iter().map(|round| round.duration_ms).sum();
    (outcome.total_ms - rounds - outcome.downtime_ms.unwrap_or(0.0)).max(0.0)
}

fn precise_ms(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.2} ms") } else { approximate_ms(ms) }
}
