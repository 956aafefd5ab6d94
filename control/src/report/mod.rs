//! Reports to be looked at: one HTML file each, with nothing outside it.
//!
//! | part | what |
//! |---|---|
//! | [`move_page`] | one move: `migrate --report FILE` |
//! | [`suite_page`] | many moves that were predicted, and how right that was: `cargo xtask convergence --report FILE` |
//!
//! Charts are SVG in the page; their colours are the style sheet's, which knows light and dark. No script, no font and no image is fetched.

mod charts;
mod figures;
mod page;

use godwit_core::predict::Forecast;
use maud::html;

pub use self::page::Tile;
use self::page::{shell, tiles};
use crate::outcome::{Outcome, OutcomeKind};
use crate::units::{approximate_bytes, approximate_ms, approximate_rate};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A chart cannot be drawn.
    #[error("a chart of the report cannot be drawn: {0}")]
    Drawing(String),
    /// The file cannot be written.
    #[error("the report cannot be written to {0}: {1}")]
    Writing(String, #[source] std::io::Error),
}

/// A move, and what is known of it beside its outcome.
#[derive(Debug, Clone, Copy)]
pub struct MoveReport<'a> {
    /// What was moved.
    pub title: &'a str,
    /// How that ended, with every round.
    pub outcome: &'a Outcome,
    /// What had been predicted.
    pub forecast: Option<&'a Forecast>,
    /// The cap.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// The longest pause to aim for.
    pub downtime_limit_ms: Option<f64>,
    /// The pause as the guest shows it from outside.
    pub gap_ms: Option<f64>,
    /// The guest's own count of what it wrote: milliseconds since the request, and pages since then.
    pub writes: &'a [(f64, u64)],
}

/// Many moves.
#[derive(Debug, Clone)]
pub struct SuiteReport<'a> {
    /// What it is.
    pub title: &'a str,
    /// What it came to.
    pub tiles: Vec<Tile>,
    /// Every move, with a word on its verdict.
    pub moves: Vec<(MoveReport<'a>, &'a str)>,
}

/// A page about one move.
pub fn move_page(report: &MoveReport<'_>) -> Result<String, ReportError> {
    let outcome = report.outcome;
    let mut facts = vec![
        Tile::new("total", approximate_ms(outcome.total_ms)),
        Tile::new("downtime", outcome.downtime_ms.map_or("none".into(), approximate_ms)),
        Tile::new("on the wire", approximate_bytes(outcome.wire_bytes as f64)),
        Tile::new("rounds after the first pass", outcome.rounds.to_string()),
    ];
    facts.extend(report.downtime_limit_ms.map(|ms| Tile::new("downtime limit", approximate_ms(ms))));
    facts.extend(report.bandwidth_bytes_per_s.map(|rate| Tile::new("cap", approximate_rate(rate))));
    let body = html! {
        header {
            h1 { (report.title) }
            p.state.good[outcome.outcome == OutcomeKind::Moved] { (outcome.headline()) }
            @for reason in &outcome.reasons { p.reason { (reason) } }
        }
        (tiles(&facts))
        (figures::of_move(report)?)
    };
    Ok(shell(report.title, &body))
}

/// A page about many moves.
pub fn suite_page(report: &SuiteReport<'_>) -> Result<String, ReportError> {
    let body = html! {
        header { h1 { (report.title) } }
        (tiles(&report.tiles))
        (figures::of_suite(report)?)
        h2 { "Each move" }
        @for (one, verdict) in &report.moves {
            details.move {
                summary { span.verdict { (verdict) } " " (one.title) }
                (figures::of_move(one)?)
            }
        }
    };
    Ok(shell(report.title, &body))
}

/// Writes a page where it is wanted.
pub fn write(path: &std::path::Path, page: &str) -> Result<(), ReportError> {
    std::fs::write(path, page).map_err(|error| ReportError::Writing(path.display().to_string(), error))
}
