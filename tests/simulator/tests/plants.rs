//! Every planted fault is found, within so many seeds.

use godwit_core::plants::{Plant, plant};
use godwit_simulator::campaign;

const SEEDS: u64 = 20_000;

#[test]
fn every_planted_fault_is_found() {
    for planted in Plant::all() {
        let totals = campaign::run(0..SEEDS, true, || plant(Some(*planted)));
        let found = totals.violations.first();
        println!("{planted}: {} seeds, {found:?}", totals.seeds);
        assert!(found.is_some(), "no seed of {SEEDS} tells {planted} from what it should be");
    }
}
