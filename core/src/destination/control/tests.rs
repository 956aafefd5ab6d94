//! The destination's control plane against every order of messages and completions.

use proptest::prelude::*;

use super::*;
use crate::machine::{MachineDescription, RegionDescription, Verdict};
use crate::memory_files::OfferedRegion;
use crate::message::{PrepareRequest, RoundStart, TableSum, Version};
use crate::ownership::store::ClaimAnswer;

fn hello() -> Message {
    let version = Version { major: VERSION.major, minor: 0 };
    Message::Hello(Hello { version, features: 0, program: "p".into(), host: "h".into() })
}

fn preflight(channels: u16) -> Message {
    let memory = vec![RegionDescription { guest_address: 0, size_bytes: 1 << 30 }];
    let machine = MachineDescription { name: "m".into(), vcpus: 1, memory, sections: Vec::new(), vmm: Vec::new() };
    Message::Preflight(PreflightRequest { machine, question: vec![7], claims: None, channels, dry_run: false })
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

fn offer(size_bytes: u64) -> MemoryOffer {
    let region = RegionDescription { guest_address: 0, size_bytes };
    MemoryOffer { boot_id: "b".into(), regions: vec![OfferedRegion { region, device: 1, inode: 2, offset: 0 }] }
}

/// A whole, healthy move whose memory is handed over.
fn handed_over() -> Vec<Input> {
    vec![
        Input::Message(hello()),
        Input::Message(Message::Memory(offer(1 << 30))),
        Input::MemoryTaken(Ok(offer(1 << 30))),
        Input::Message(preflight(0)),
        Input::Checked(Verdict::default()),
        Input::Message(prepare(true)),
        Input::Built(Ok(Duration::ZERO)),
        Input::DataOpened(Ok(())),
        Input::Message(Message::State(Vec::new())),
        Input::Message(Message::Table(TableSum { sum: 0 })),
        Input::Loaded(Ok(Vec::new())),
        Input::Message(commit()),
        Input::Started(Ok(Vec::new())),
    ]
}

#[test]
fn memory_that_is_handed_over_needs_no_data_channel() {
    let run = run(DestinationOptions::default(), handed_over());
    assert!(run.owned && run.gave_up.is_none(), "{run:?}");
}

#[test]
fn invariant_4_memory_of_another_machine_is_refused() {
    let mut inputs = handed_over();
    inputs[2] = Input::MemoryTaken(Ok(offer(1 << 29)));
    let run = run(DestinationOptions::default(), inputs);
    assert!(run.gave_up.is_some_and(|why| why.contains("not the machine's")) && !run.loaded);
}

#[test]
fn memory_that_cannot_be_taken_over_is_sent() {
    let mut inputs = healthy();
    inputs.splice(2..2, [Input::Message(Message::Memory(offer(1 << 30))), Input::MemoryTaken(Err("no".into()))]);
    let sent = run(DestinationOptions::default(), inputs);
    assert!(sent.owned && sent.gave_up.is_none(), "{sent:?}");
    let mut inputs = handed_over();
    inputs[2] = Input::MemoryTaken(Err("no".into()));
    assert!(run(DestinationOptions::default(), inputs).gave_up.is_some(), "without channels nothing would come");
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (0usize..15).prop_map(|index| healthy().swap_remove(index)),
        (0usize..13).prop_map(|index| handed_over().swap_remove(index)),
        Just(Input::LinkLost("cut".into())),
        Just(Input::Nonsense("bad".into())),
        Just(Input::ChannelLost("cut".into())),
        Just(Input::Returned { token: SessionToken([3; 16]) }),
        Just(Input::NotReturned),
        Just(Input::Stop),
        Just(Input::Message(Message::Keep(Duration::from_secs(5)))),
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

/// The first of a healthy move, as far as the last page of the first pass; what arrives is to be kept.
fn receiving() -> DestinationControl {
    let mut control = DestinationControl::new(DestinationOptions::default(), SessionToken([0; 16]), "peer".into());
    let mut inputs = healthy();
    inputs.insert(4, Input::Message(Message::Keep(Duration::from_secs(5))));
    for input in inputs.into_iter().take(9) {
        told(&mut control, input);
    }
    control
}

/// What it does on an input.
fn told(control: &mut DestinationControl, input: Input) -> Vec<Action> {
    control.handle(input);
    std::iter::from_fn(|| control.poll_action()).collect()
}

#[test]
fn what_has_arrived_is_kept_until_the_source_is_back() {
    let token = SessionToken([9; 16]);
    let lost: [fn() -> Input; 2] = [|| Input::LinkLost("cut".into()), || Input::ChannelLost("cut".into())];
    for lost in lost {
        let mut control = receiving();
        // Of the broken attempt, and to be forgotten.
        told(&mut control, Input::ChannelEnded { sum: 7 });
        told(&mut control, Input::Message(Message::Table(TableSum { sum: 7 })));
        let actions = told(&mut control, lost());
        assert!(
            matches!(actions[..], [Action::Say(_), Action::Detach, Action::AwaitReturn(limit)] if limit.as_secs() == 5),
            "{actions:?}"
        );
        assert!(told(&mut control, Input::LinkLost("late".into())).is_empty());
        let actions = told(&mut control, Input::Returned { token });
        let [Action::Attach, Action::Say(_), Action::Send(Message::Attached(shown)), Action::OpenData { channels: 2 }] =
            &actions[..]
        else {
            panic!("{actions:?}")
        };
        assert_eq!(*shown, token);
        for input in healthy().into_iter().skip(6).take(5) {
            told(&mut control, input);
        }
        let actions = told(&mut control, Input::Message(Message::Table(TableSum { sum: 42 })));
        assert!(matches!(actions[..], [Action::Load(..)]), "{actions:?}");
    }
}

#[test]
fn a_source_that_is_back_before_the_break_was_noticed_is_taken_up() {
    let mut control = receiving();
    let actions = told(&mut control, Input::Returned { token: SessionToken([9; 16]) });
    assert!(matches!(actions[..2], [Action::Detach, Action::Attach]), "{actions:?}");
}

#[test]
fn the_last_word_of_a_source_that_ends_the_move_counts_after_its_data_channels_are_gone() {
    let mut control = receiving();
    told(&mut control, Input::ChannelLost("end of file".into()));
    let actions = told(&mut control, Input::Message(Message::Abort("cancelled".into())));
    assert!(matches!(&actions[..], [Action::GiveUp(why)] if why.contains("cancelled")), "{actions:?}");
}

#[test]
fn nothing_is_kept_for_a_source_that_does_not_come_back_or_never_asked() {
    let mut control = receiving();
    told(&mut control, Input::LinkLost("cut".into()));
    assert!(matches!(told(&mut control, Input::NotReturned)[..], [Action::GiveUp(_)]));
    let gave_up = run(
        DestinationOptions::default(),
        healthy().into_iter().take(8).chain([Input::LinkLost("cut".into())]).collect(),
    );
    assert!(gave_up.gave_up.is_some_and(|why| why.contains("cut")));
    let options = DestinationOptions { keep_limit: Duration::ZERO, ..DestinationOptions::default() };
    let mut inputs: Vec<_> = healthy().into_iter().take(8).collect();
    inputs.insert(4, Input::Message(Message::Keep(Duration::from_secs(5))));
    inputs.push(Input::LinkLost("cut".into()));
    assert!(run(options, inputs).gave_up.is_some());
}

#[test]
fn a_source_that_is_back_after_its_state_was_loaded_ends_it() {
    let mut inputs: Vec<_> = healthy().into_iter().take(13).collect();
    inputs.insert(4, Input::Message(Message::Keep(Duration::from_secs(5))));
    inputs.push(Input::Returned { token: SessionToken([9; 16]) });
    let run = run(DestinationOptions::default(), inputs);
    assert!(run.ready && run.gave_up.is_some() && !run.started, "{run:?}");
}

mod with_claims {
    //! The same where the machine has claims: *commit* only says that it may be claimed.

    use super::*;
    use crate::ownership::store::Occupant;
    use crate::ownership::{Claimant, Rules};

    fn epoch(n: u64) -> Epoch {
        Epoch::new(n).unwrap()
    }

    fn claimant(host: &str) -> Claimant {
        let name = |text: &str| text.parse().unwrap();
        Claimant { machine: name("m"), host: name(host), boot_id: name("b"), instance: name("i") }
    }

    fn ready(claims: bool) -> DestinationControl {
        let mut control = DestinationControl::new(DestinationOptions::default(), SessionToken([0; 16]), "peer".into());
        if claims {
            control.expect_claim(DestinationHandover::new(claimant("here"), epoch(2), Rules::default()));
        }
        let before_commit = healthy().into_iter().take(13);
        let last = before_commit.map(|input| told(&mut control, input)).last().unwrap();
        assert!(matches!(last[..], [Action::Send(Message::Ready(_))]), "{last:?}");
        control
    }

    fn commit(epoch: u64) -> Input {
        Input::Message(Message::Commit(Commit { epoch, nonce: 9, run: true }))
    }

    fn claims_epoch_2(actions: &[Action]) -> bool {
        matches!(actions, [Action::Claim(claim)] if *claim == claimant("here").claim(epoch(2), Nonce(9)))
    }

    #[test]
    fn invariant_1_nothing_starts_before_the_claim_is_won_and_only_the_store_ends_it() {
        let mut control = ready(true);
        assert!(claims_epoch_2(&told(&mut control, commit(2))));
        for input in [Input::LinkLost("cut".into()), Input::Message(Message::Abort("no".into())), commit(2)] {
            assert!(told(&mut control, input).is_empty());
        }
        let actions = told(&mut control, Input::Claimed(ClaimAnswer::Unknown("slow".into())));
        assert!(matches!(actions[..], [Action::Say(_), Action::Wait]), "{actions:?}");
        assert!(claims_epoch_2(&told(&mut control, Input::Retry)));
        let ours = Occupant::Claim(claimant("here").claim(epoch(2), Nonce(9)));
        let actions = told(&mut control, Input::Claimed(ClaimAnswer::Exists(ours)));
        assert!(matches!(actions[..], [Action::Start { run: true }]), "{actions:?}");
        let actions = told(&mut control, Input::Started(Ok(Vec::new())));
        let [Action::MarkRunning(marked), Action::Send(Message::Running(_)), Action::Own { running: true, right }] =
            &actions[..]
        else {
            panic!("{actions:?}")
        };
        assert_eq!(*marked, epoch(2));
        assert!(right.as_ref().is_some_and(|(right, nonce)| right.epoch() == epoch(2) && *nonce == Nonce(9)));
    }

    #[test]
    fn invariant_1_a_machine_that_cannot_be_claimed_is_dropped() {
        let theirs = Occupant::Claim(claimant("there").claim(epoch(2), Nonce(1)));
        for answer in [ClaimAnswer::Exists(theirs), ClaimAnswer::Failed("full".into())] {
            let mut control = ready(true);
            told(&mut control, commit(2));
            let actions = told(&mut control, Input::Claimed(answer));
            assert!(matches!(actions[..], [Action::Send(Message::Abort(_)), Action::Lose(_)]), "{actions:?}");
        }
    }

    #[test]
    fn another_epoch_than_was_agreed_on_is_no_handover() {
        for (claims, epoch) in [(true, 0), (true, 1), (true, 3), (false, 2)] {
            let actions = told(&mut ready(claims), commit(epoch));
            assert!(matches!(actions[..], [Action::Send(Message::Abort(_)), Action::Lose(_)]), "{actions:?}");
        }
    }

    #[test]
    fn before_commit_a_lost_link_ends_it_as_without_claims() {
        let actions = told(&mut ready(true), Input::LinkLost("cut".into()));
        assert!(matches!(actions[..], [Action::GiveUp(_)]), "{actions:?}");
    }
}

mod postcopy;
