//! How right the predictions were: pure arithmetic over predictions and what was measured.

use serde::{Deserialize, Serialize};

/// A prediction, and what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// By the prediction, the guest is within a tenth of the write rate at which the verdict changes.
    pub border: bool,
    /// Predicted to converge.
    pub predicted: bool,
    /// Did converge.
    pub converged: bool,
    /// Until the guest ran at the destination, predicted and measured.
    pub total_ms: (f64, f64),
    /// The pause, predicted and measured.
    pub pause_ms: (f64, f64),
}

/// All of them in a few numbers. Border cases count in `moves` and `border`, and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Moves that were predicted and made.
    pub moves: usize,
    /// Of those, measured not to converge.
    pub not_converging: usize,
    /// So near the border that either may happen.
    pub border: usize,
    /// Share of the others whose verdict was right.
    pub converge_verdict_right: f64,
    /// Of those that did converge, as predicted: how far the predicted time was from the measured one.
    pub total_error_mean_pct: f64,
    /// The same, nine of ten are nearer.
    pub total_error_p90_pct: f64,
    /// And how far the predicted pause was.
    pub downtime_error_mean_pct: f64,
}

impl Case {
    /// Verdict as predicted.
    pub fn right(&self) -> bool {
        self.predicted == self.converged
    }

    /// By how much the predicted time is off, in percent of the measured one; longer is positive. `None`: there is nothing to compare.
    pub fn total_error_pct(&self) -> Option<f64> {
        self.error_pct(self.total_ms)
    }

    /// The same for the pause.
    pub fn downtime_error_pct(&self) -> Option<f64> {
        self.error_pct(self.pause_ms)
    }

    fn error_pct(&self, (predicted, measured): (f64, f64)) -> Option<f64> {
        (self.predicted && self.converged && measured > 0.0).then(|| (predicted / measured - 1.0) * 100.0)
    }
}

impl Score {
    /// Of these cases.
    pub fn of(cases: &[Case]) -> Self {
        let apart: Vec<&Case> = cases.iter().filter(|case| !case.border).collect();
        let right = apart.iter().filter(|case| case.right()).count();
        let errors = |error: fn(&Case) -> Option<f64>| -> Vec<f64> {
            apart.iter().filter_map(|case| error(case)).map(f64::abs).collect()
        };
        let total = errors(Case::total_error_pct);
        Self {
            moves: cases.len(),
            not_converging: apart.iter().filter(|case| !case.converged).count(),
            border: cases.len() - apart.len(),
            converge_verdict_right: right as f64 / apart.len().max(1) as f64,
            total_error_mean_pct: mean(&total),
            total_error_p90_pct: percentile(total, 0.9),
            downtime_error_mean_pct: mean(&errors(Case::downtime_error_pct)),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The smallest value that so large a share does not exceed.
fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(predicted: bool, converged: bool, total_ms: (f64, f64)) -> Case {
        Case { border: false, predicted, converged, total_ms, pause_ms: (50.0, 40.0) }
    }

    #[test]
    fn border_cases_stand_apart_and_errors_are_of_moves_that_converged_as_predicted() {
        let near = Case { border: true, ..case(true, false, (1.0, 9.0)) };
        let cases = [
            case(true, true, (110.0, 100.0)),
            case(true, true, (80.0, 100.0)),
            case(false, true, (500.0, 100.0)),
            case(false, false, (500.0, 100.0)),
            near,
        ];
        let score = Score::of(&cases);
        assert_eq!((score.moves, score.not_converging, score.border), (5, 1, 1));
        assert_eq!(score.converge_verdict_right, 0.75);
        assert!((score.total_error_mean_pct - 15.0).abs() < 1e-9 && (score.total_error_p90_pct - 20.0).abs() < 1e-9);
        assert!((score.downtime_error_mean_pct - 25.0).abs() < 1e-9);
    }

    #[test]
    fn nine_of_ten_are_within_the_90th_percentile() {
        assert_eq!(percentile((1..=10).map(f64::from).collect(), 0.9), 9.0);
        assert_eq!(percentile((1..=11).map(f64::from).collect(), 0.9), 10.0);
        assert_eq!((percentile(vec![3.0], 0.9), percentile(vec![], 0.9)), (3.0, 0.0));
    }
}
