//! A few hundred seeds, and that a seed is always the same.

use godwit_simulator::campaign;
use godwit_simulator::verdict::play;

#[test]
fn nothing_that_must_never_happen_does() {
    let totals = campaign::run(0..400, false, || {});
    assert_eq!(totals.violations, []);
    assert_eq!(totals.moved + totals.stayed + totals.person, 400);
    for (outcome, seeds) in [("moved", totals.moved), ("stayed", totals.stayed), ("person", totals.person)] {
        assert!(seeds >= 4, "only {seeds} of 400 seeds ended {outcome}: the faults are not what they were");
    }
}

#[test]
fn a_seed_is_played_the_same_way_every_time() {
    for seed in 0..40 {
        assert_eq!(play(seed, false), play(seed, false), "seed {seed}");
    }
}
