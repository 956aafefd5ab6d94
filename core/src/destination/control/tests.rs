//! The destination's control plane against every order of messages and completions.

use proptest::prelude::*;

use super::*;
use crate::machine::RegionDescription;
use crate::message::{RoundStart, TableSum, Version};

fn hello() -> Message {
    let version = Version { major: VERSION.major, minor: 0 };
    Message::Hello(Hello { version, features: 0, program: "p".into(), host: "h".into() })
}

fn preflight(channels: u16) -> Message {
    let memory = vec![RegionDescription { guest_address: 0, size_bytes: 1 << 30 }];
    let machine = MachineDescription { name: "m".into(), vcpus: 1, memory, sections: Vec::new(), vmm: Vec::new() };
    Message::Preflight(PreflightRequest { machine, question: vec![7], channels, dry_run: false })
}

fn prepare(verify: bool) -> Message {
    Message::Prepare(PrepareRequest { table_seed: 1, verify, clock_offset_ns: 5, rehearsal: Vec::new() })
}

fn commit() -> Message {
    Message::Commit(Commit { epoch: 0, nonce: 0, run: true })
}

/// A whole, healthy move of two channels, in order.
fn healthy() -> Vec<Input> {
    vec![
        Input::Message(hello()),
        Input::Message(Message::ClockRequest(1)),
        Input::Message(preflight(2)),
        Input::Checked(Verdict::default()),
        Input::Message(prepare(true)),
        Input::Built(Ok(Duration::ZERO)),
        Input::DataOpened(Ok(())),
        Input::Message(Message::Round(RoundStart { round: 0, pages: 1 })),
        Input::Message(Message::State(Vec::new())),
        Input::ChannelEnded { sum: 40 },
        Input::ChannelEnded { sum: 2 },
        Input::Message(Message::Table(TableSum { sum: 42 })),
        Input::Loaded(Ok(Vec::new())),
        Input::Message(commit()),
        Input::Started(Ok(Vec::new())),
    ]
}

#[derive(Default, Debug)]
struct Run {
    loaded: bool,
    ready: bool,
    started: bool,
    owned: bool,
    gave_up: Option<String>,
}

fn run(options: DestinationOptions, inputs: Vec<Input>) -> Run {
    let mut control = DestinationControl::new(options, SessionToken([0; 16]), "peer".into());
    let mut run = Run::default();
    for input in inputs {
        let is_commit = matches!(input, Input::Message(Message::Commit(_)));
        control.handle(input);
        while let Some(action) = control.poll_action() {
            assert!(run.gave_up.is_none() || matches!(action, Action::Send(Message::Abort(_))), "acts after giving up");
            match action {
                Action::Load(..) => run.loaded = true,
                Action::Send(Message::Ready(_)) => run.ready = true,
                Action::Start { .. } => {
                    assert!(is_commit && run.ready, "invariant 1: nothing starts without ready and commit");
                    run.started = true;
                }
                Action::Own { .. } => {
                    assert!(run.started, "invariant 1: nothing is owned before commit");
                    run.owned = true;
                }
                Action::GiveUp(why) => {
                    assert!(!run.started, "invariant 1: after commit the machine is not dropped");
                    run.gave_up = Some(why);
                }
                _ => {}
            }
        }
    }
    run
}

#[test]
fn a_healthy_move_ends_in_ownership() {
    let run = run(DestinationOptions::default(), healthy());
    assert!(run.owned && run.gave_up.is_none(), "{run:?}");
}

#[test]
fn invariant_4_nothing_is_loaded_over_memory_that_is_not_what_was_sent() {
    let mut inputs = healthy();
    inputs[11] = Input::Message(Message::Table(TableSum { sum: 43 }));
    let run = run(DestinationOptions::default(), inputs);
    assert!(!run.loaded && run.gave_up.is_some_and(|why| why.contains("tables differ")));
}

#[test]
fn invariant_4_nothing_is_loaded_before_every_channel_has_ended() {
    let mut inputs = healthy();
    inputs.remove(10);
    assert!(!run(DestinationOptions::default(), inputs).loaded);
}

#[test]
fn impossible_numbers_of_channels_are_refused() {
    for channels in [0, MAX_CHANNELS + 1, u16::MAX] {
        let inputs = vec![Input::Message(hello()), Input::Message(preflight(channels))];
        assert!(run(DestinationOptions::default(), inputs).gave_up.is_some());
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (0usize..15).prop_map(|index| healthy().swap_remove(index)),
        Just(Input::LinkLost("cut".into())),
        Just(Input::ChannelFailed("bad".into())),
        Just(Input::Message(Message::Abort("no".into()))),
        Just(Input::Message(Message::Running(Vec::new()))),
        Just(Input::Built(Err("no".into()))),
        Just(Input::DataOpened(Err("no".into()))),
        Just(Input::Loaded(Err("no".into()))),
        Just(Input::Started(Err("no".into()))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn invariant_1_holds_for_any_order_of_inputs(inputs in prop::collection::vec(any_input(), 0..40)) {
        run(DestinationOptions::default(), inputs);
    }

    #[test]
    fn invariant_1_holds_for_a_move_with_anything_in_between(at in 0usize..15, more in prop::collection::vec(any_input(), 0..4), drop_one: bool) {
        let mut inputs = healthy();
        if drop_one {
            inputs.remove(at);
        }
        inputs.splice(at..at, more);
        run(DestinationOptions::default(), inputs);
    }
}
