//! Post-copy, as far as it is the destination's control plane's until the machine is its own.

use super::*;
use crate::postcopy::Missing;

fn missing(last: bool) -> Input {
    Input::Message(Message::Missing(Missing { whole: vec![(0, 1)], partly: Vec::new(), last }))
}

/// A whole, healthy move that goes over in its first round.
fn healthy_late() -> Vec<Input> {
    let mut inputs = healthy();
    inputs.splice(8..8, [Input::Message(Message::PostCopy(())), Input::FillingJudged(None), Input::DataOpened(Ok(()))]);
    inputs.splice(14..14, [missing(false), missing(true)]);
    inputs
}

fn actions(inputs: Vec<Input>) -> Vec<String> {
    let mut control = DestinationControl::new(DestinationOptions::default(), SessionToken([0; 16]), "peer".into());
    let mut actions = Vec::new();
    for input in inputs {
        control.handle(input);
        actions.extend(std::iter::from_fn(|| control.poll_action()).map(|action| format!("{action:?}")));
    }
    actions
}

#[test]
fn what_is_missing_is_known_before_state_is_loaded() {
    assert!(run(DestinationOptions::default(), healthy_late()).owned);
    let actions = actions(healthy_late());
    let place = |name: &str| actions.iter().position(|action| action.starts_with(name)).expect(name);
    let order = ["JudgeFilling", "Send(PostCopyAnswer(None", "OpenPages { first: 2 }", "NoteMissing", "Load", "Start"];
    assert!(order.map(place).is_sorted(), "{actions:#?}");
    assert_eq!(actions.iter().filter(|action| action.starts_with("NoteMissing")).count(), 2);
}

#[test]
fn half_of_what_is_missing_is_nothing_to_load_over() {
    let mut inputs = healthy_late();
    inputs.remove(15);
    let run = run(DestinationOptions::default(), inputs);
    assert!(!run.loaded && run.gave_up.is_some_and(|why| why.contains("which pages are missing")));
}

#[test]
fn a_host_that_cannot_goes_on_as_before() {
    let mut inputs = healthy();
    inputs.splice(8..8, [Input::Message(Message::PostCopy(())), Input::FillingJudged(Some("no".into()))]);
    assert!(run(DestinationOptions::default(), inputs.clone()).owned);
    inputs.insert(10, missing(true));
    let run = run(DestinationOptions::default(), inputs);
    assert!(run.gave_up.is_some_and(|why| why.contains("no place here")), "nothing may be missing then");
}

#[test]
fn preflight_looks_whether_it_could_be() {
    let mut inputs = healthy();
    inputs.insert(2, Input::Message(Message::PostCopyWanted(())));
    let actions = actions(inputs);
    let place = |name: &str| actions.iter().position(|action| action.starts_with(name)).expect(name);
    assert!(place("CheckFilling") < place("Check("), "{actions:#?}");
}
