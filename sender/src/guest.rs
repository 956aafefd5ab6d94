//! `guest`: the workload guest's rate, state and check.

use std::process::ExitCode;
use std::time::Duration;

use godwit_control::console::out;
use godwit_control::qmp::Client;
use serde_json::{Value, json};

use crate::Failure;
use crate::cli::GuestAction;

/// A check reads every page of the guest's memory.
const CHECK_LIMIT: Duration = Duration::from_secs(600);

/// Exit code of a check that found something wrong.
const EXIT_WRONG: u8 = 1;

/// Steers or checks the workload guest.
pub(crate) fn guest(action: &GuestAction, json: bool) -> Result<ExitCode, Failure> {
    match action {
        GuestAction::Rate { control, rate } => {
            let rate = json!(rate);
            let answer = Client::connect(&control.path())?.execute("x-godwit-guest", json!({ "rate": rate }))?;
            tell(&answer, json);
            Ok(ExitCode::SUCCESS)
        }
        GuestAction::Status(control) => {
            let answer = Client::connect(&control.path())?.execute("x-godwit-guest", json!({}))?;
            tell(&answer, json);
            Ok(ExitCode::SUCCESS)
        }
        GuestAction::Check(control) => {
            let mut client = Client::connect(&control.path())?;
            let answer = client.execute_within("x-godwit-guest-check", json!({}), CHECK_LIMIT)?;
            tell(&answer, json);
            Ok(match answer["ok"] == true {
                true => ExitCode::SUCCESS,
                false => ExitCode::from(EXIT_WRONG),
            })
        }
    }
}

fn tell(answer: &Value, json: bool) {
    if json {
        return out(answer);
    }
    for (name, value) in answer.as_object().into_iter().flatten() {
        match value {
            Value::String(text) => out(format_args!("{name}: {text}")),
            value => out(format_args!("{name}: {value}")),
        }
    }
}
