//! The commands that talk to a running machine: what each asks of its control socket, and what it says then.

use std::process::ExitCode;

use godwit_control::console::{out, say};
use godwit_control::display::progress_text;
use godwit_control::qmp::client::given;
use godwit_control::qmp::{Client, ClientError};
use serde_json::{Value, json};

use crate::Failure;
use crate::cli::{ClientVerb, ControlArgs, SetArgs, ShowArgs, StatusArgs};
use crate::doubt;
use crate::estimate::estimate;
use crate::follow::{OnInterrupt, follow};
use crate::guest::guest;
use crate::interrupt::Interrupts;
use crate::migrate::{migrate, or_zero, whole_ms};

/// Does what `verb` says.
pub(crate) fn execute(verb: &ClientVerb, json: bool) -> Result<ExitCode, Failure> {
    match verb {
        ClientVerb::Migrate(args) => migrate(args, json),
        ClientVerb::Estimate(args) => estimate(args, json),
        ClientVerb::Status(args) => status(args, json),
        ClientVerb::Set(args) => set(args, json),
        ClientVerb::Cancel(control) => cancel(control, json),
        ClientVerb::Continue(control) => {
            simple(control, "migrate-continue", json!({ "state": "pre-switchover" }), "the move goes on", json)
        }
        ClientVerb::Postcopy(control) => {
            simple(control, "migrate-start-postcopy", json!({}), "the move goes over to post-copy", json)
        }
        ClientVerb::Pause(control) => simple(control, "stop", json!({}), "the guest is paused", json),
        ClientVerb::Resume(args) if args.force => doubt::resume_force(args, json),
        ClientVerb::Resume(args) => simple(&args.control, "cont", json!({}), "the guest runs", json),
        ClientVerb::Abandon(args) => doubt::abandon(args, json),
        ClientVerb::Announce(control) => announce(control, json),
        ClientVerb::Powerdown(control) => {
            simple(control, "system_powerdown", json!({}), "the guest was asked to power down", json)
        }
        ClientVerb::Quit(control) => simple(control, "quit", json!({}), "the machine is stopped for good", json),
        ClientVerb::Show(args) => show(args, json),
        ClientVerb::Guest(args) => guest(&args.action, json),
        ClientVerb::Release(control) => simple(control, "x-godwit-release-hold", json!({}), "released", json),
    }
}

/// One command and one sentence.
fn simple(control: &ControlArgs, command: &str, arguments: Value, said: &str, json: bool) -> Result<ExitCode, Failure> {
    let answer = Client::connect(&control.path())?.execute(command, arguments)?;
    say(said);
    if json {
        out(answer);
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the machine announced, and says what the first round of frames was.
fn announce(control: &ControlArgs, json: bool) -> Result<ExitCode, Failure> {
    let answer = Client::connect(&control.path())?.execute("announce-self", json!({}))?;
    let interfaces = answer["x-godwit-first-round"].as_array().cloned().unwrap_or_default();
    for interface in &interfaces {
        let id = interface["id"].as_str().unwrap_or_default();
        say(format!("{id}: announced, {} frames a round", interface["frames"].as_u64().unwrap_or(0)));
    }
    if interfaces.is_empty() {
        say("nothing announced: the machine has no network interface");
    }
    if json {
        out(answer);
    }
    Ok(ExitCode::SUCCESS)
}

fn set(args: &SetArgs, json: bool) -> Result<ExitCode, Failure> {
    let parameters = given([
        ("max-bandwidth", args.max_bandwidth.map(|bandwidth| json!(or_zero(bandwidth)))),
        ("downtime-limit", args.downtime_limit.map(|limit| json!(whole_ms(limit)))),
    ]);
    simple(&args.control, "migrate-set-parameters", parameters, "set, for a running move and for later ones", json)
}

/// Calls a running move off and waits for its end.
fn cancel(control: &ControlArgs, json: bool) -> Result<ExitCode, Failure> {
    let mut client = Client::connect(&control.path())?;
    let Some(number) = active_move(&mut client)? else {
        say("no move is running");
        return Ok(ExitCode::SUCCESS);
    };
    client.execute("migrate_cancel", json!({}))?;
    let followed = follow(&mut client, number, json, &Interrupts::count()?, OnInterrupt::Leave)?;
    Ok(followed.exit_code_of_cancel())
}

fn status(args: &StatusArgs, json: bool) -> Result<ExitCode, Failure> {
    let mut client = Client::connect(&args.control.path())?;
    if args.watch
        && let Some(number) = active_move(&mut client)?
    {
        return Ok(follow(&mut client, number, json, &Interrupts::count()?, OnInterrupt::Leave)?.exit_code());
    }
    let name = client.execute("query-name", json!({}))?;
    let status = client.execute("query-status", json!({}))?;
    let migration = client.execute("x-godwit-query-migrate", json!({}))?;
    let ownership = client.execute("x-godwit-query-ownership", json!({}))?;
    if json {
        out(json!({
            "name": name["name"],
            "status": status["status"],
            "running": status["running"],
            "migration": migration,
            "ownership": ownership,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    out(format_args!("{}: {}", text(&name["name"]), text(&status["status"])));
    if migration["active"] == true {
        out(format_args!("move {} to {}", migration["move"], text(&migration["uri"])));
        if let Ok(progress) = serde_json::from_value(migration["progress"].clone()) {
            out(progress_text(&progress));
        }
    } else if let Some(uri) = migration["uri"].as_str() {
        let outcome = &migration["outcome"];
        out(format_args!("last move, to {uri}: {}", text(&outcome["outcome"])));
        for reason in outcome["reasons"].as_array().into_iter().flatten() {
            out(format_args!("  {}", text(reason)));
        }
        // What it says of the guest was so then, and is so still unless the guest runs.
        if outcome["outcome"] == "unknown" && status["running"] == false {
            out(text(&outcome["state"]));
        }
    }
    if let (Some(directory), Some(epoch)) = (ownership["directory"].as_str(), ownership["epoch"].as_u64()) {
        out(format_args!("claims in {directory}, here epoch {epoch}"));
    }
    if let Some(waiting) = ownership["waiting"].as_str() {
        out(format_args!("waits: {waiting}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(args: &ShowArgs, json: bool) -> Result<ExitCode, Failure> {
    let answer = Client::connect(&args.control.path())?.execute("x-godwit-machine-definition", json!({}))?;
    match answer["toml"].as_str() {
        Some(toml) if !json => out(toml.trim_end()),
        _ => out(answer),
    }
    Ok(ExitCode::SUCCESS)
}

fn active_move(client: &mut Client) -> Result<Option<u64>, ClientError> {
    let migration = client.execute("x-godwit-query-migrate", json!({}))?;
    Ok(migration["move"].as_u64().filter(|_| migration["active"] == true))
}
