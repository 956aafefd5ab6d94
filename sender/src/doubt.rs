//! `resume --force` and `abandon`: a person's word about a machine of which nobody knows who has it.

use std::process::ExitCode;
use std::time::Duration;

use godwit_control::claims::rough;
use godwit_control::console::{out, say};
use godwit_control::qmp::{Client, ClientError};
use serde_json::{Value, json};

use crate::Failure;
use crate::cli::{AbandonArgs, ResumeArgs};

/// Lets the guest run on here, on a person's word that it never ran at the destination and never will.
pub(crate) fn resume_force(args: &ResumeArgs, json: bool) -> Result<ExitCode, Failure> {
    let mut client = Client::connect(&args.control.path())?;
    let facts = facts(&mut client, "resume --force")?;
    let epoch = force_epoch(&facts)?;
    let mut lines = known(&facts);
    lines.extend(risk_of_resuming(&facts));
    args.confirm.ask(&lines, text(&facts, "machine"))?;
    let answer =
        said(client.execute("x-godwit-resume-force", epoch.map_or(json!({}), |epoch| json!({ "epoch": epoch }))))?;
    match answer["epoch"].as_u64() {
        Some(epoch) => say(format_args!("claimed epoch {epoch}: the guest runs here")),
        None => say("the guest runs here"),
    }
    if json {
        out(json!({ "done": "resume --force", "epoch": answer["epoch"], "known": facts, "said": lines }));
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends the copy here for good, on a person's word that it is never to run.
pub(crate) fn abandon(args: &AbandonArgs, json: bool) -> Result<ExitCode, Failure> {
    let mut client = Client::connect(&args.control.path())?;
    let facts = facts(&mut client, "abandon")?;
    let mut lines = match text(&facts, "owner") {
        "claiming" => handed_over(&facts),
        "incomplete" => incomplete(&facts),
        _ => known(&facts),
    };
    lines.extend(risk_of_abandoning(&facts));
    args.confirm.ask(&lines, text(&facts, "machine"))?;
    said(client.execute("x-godwit-abandon", json!({})))?;
    say("abandoned: the copy here is gone for good");
    say(where_it_is(&facts));
    if json {
        out(json!({ "done": "abandon", "known": facts, "said": lines }));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is known of a machine in doubt, the claims read afresh.
fn facts(client: &mut Client, verb: &str) -> Result<Value, Failure> {
    let facts = client.execute("x-godwit-query-ownership", json!({ "look": true }))?;
    let why = match text(&facts, "owner") {
        "in-doubt" => return Ok(facts),
        "claiming" | "incomplete" if verb == "abandon" => return Ok(facts),
        "claiming" => {
            "it has been handed over to this process, which is claiming it: it runs as soon as that is won".into()
        }
        "incomplete" => format!(
            "it has gone on at {}, and some of its memory is still to follow: the copy here is out of date and never runs",
            text(&facts, "peer")
        ),
        "moved" => format!("it has moved to {}", text(&facts, "peer")),
        "coming-in" => format!("a machine is coming in from {}, and is that end's", text(&facts, "peer")),
        "here" => "it is this process's (`status`, `resume`, `quit`)".into(),
        _ => "there is none here".into(),
    };
    Err(Failure::Refused(format!("{verb}: nobody is in doubt about the machine `{}`: {why}", text(&facts, "machine"))))
}

/// The epoch whose owner is said never to have run the guest; `None` for a machine without claims. Refused where a word cannot help.
fn force_epoch(facts: &Value) -> Result<Option<u64>, Failure> {
    let Some(directory) = facts["directory"].as_str() else { return Ok(None) };
    if let Some(why) = facts["unreadable"].as_str() {
        return Err(Failure::Refused(format!(
            "nothing was done: a machine that has claims runs nowhere without a claim, and none can be made now: {why}. This process keeps asking; once {directory} \
             answers, it goes on by itself or can be forced"
        )));
    }
    let newest = &facts["newest"];
    match newest["epoch"].as_u64() {
        Some(epoch) if Some(epoch) == facts["epoch"].as_u64() => Err(Failure::Refused(format!(
            "nothing was done, and need not be: epoch {epoch}, this process's own, is still the newest. It is claiming the next one itself, \
             and the guest runs here as soon as that is won"
        ))),
        Some(epoch) if newest["running"] == true || newest["free"] == true => Err(Failure::Refused(format!(
            "nothing was done: the guest has run in epoch {epoch} ({}). What is paused here is out of date, and ends by itself",
            text(facts, "owned")
        ))),
        Some(epoch) => Ok(Some(epoch)),
        None => Err(Failure::Refused(format!(
            "nothing was done: {directory} shows no claim at all: is that the right share, and mounted?"
        ))),
    }
}

fn known(facts: &Value) -> Vec<String> {
    let age = rough(Duration::from_secs(facts["age_s"].as_u64().unwrap_or(0)));
    let mut lines = vec![format!(
        "machine `{}`: paused here; {age} ago it could not be told whether {} has taken it over",
        text(facts, "machine"),
        text(facts, "peer")
    )];
    lines.extend(facts["heard"].as_str().map(|heard| format!("what was heard then: {heard}")));
    match facts["directory"].as_str() {
        None => lines.push("it has no claims: nothing on shared storage knows who has it".into()),
        Some(directory) => {
            let claims = facts["unreadable"].as_str().or(facts["owned"].as_str()).unwrap_or("no claim is to be seen");
            let ran = match facts["newest"]["running"].as_bool() {
                Some(true) => "; the guest has run there",
                Some(false) if facts["newest"]["epoch"] != facts["epoch"] => {
                    "; nothing shows that the guest has run there"
                }
                _ => "",
            };
            lines.push(format!("its claims in {directory}: {claims}{ran}"));
        }
    }
    lines
}

/// The same at a destination that does not know yet whether it has won the claim.
fn handed_over(facts: &Value) -> Vec<String> {
    vec![
        format!("handed over by {}, and not running here", text(facts, "peer")),
        format!("what it waits for: {}", text(facts, "waiting")),
    ]
}

fn risk_of_resuming(facts: &Value) -> Vec<String> {
    let there = host(facts);
    let next = facts["newest"]["epoch"].as_u64().map(|epoch| epoch.saturating_add(1));
    let does = match next {
        Some(next) => format!("This claims epoch {next} and lets the guest run on here, with the memory from before the handover."),
        None => "This lets the guest run on here, with the memory from before the handover; nothing keeps another from running it.".into(),
    };
    let mut lines = vec![
        does,
        format!(
            "RISK: if the guest runs at {there}, there are then two of it: both write to the same disks and answer to the same addresses."
        ),
        format!(
            "RISK: if it has run at {there} at all, even for a moment, its disks are newer than the memory here, and running on destroys its \
             file systems."
        ),
        format!(
            "Do it only if you know that {there} never ran it and never will: its process has ended, or the host is off, before it began."
        ),
    ];
    if let Some(epoch) = facts["newest"]["epoch"].as_u64() {
        lines.push(format!(
            "If you know only that it is dead: `abandon` here, then `run --take-ownership={epoch}`, which boots the machine from its disks."
        ));
    }
    lines
}

fn risk_of_abandoning(facts: &Value) -> Vec<String> {
    if text(facts, "owner") == "incomplete" {
        return vec![format!(
            "RISK: {} never gets what it lacks. The guest is lost, also if it still runs there, and has to be booted from its disks.",
            text(facts, "peer")
        )];
    }
    vec![
        "This ends the process here. The guest's memory that is paused in it is gone for good.".into(),
        format!(
            "RISK: if {} does not have the machine, nobody has: what was only in its memory is lost, and it can only be booted from its disks.{}",
            host(facts),
            match text(facts, "owner") {
                "claiming" =>
                    " A claim of this end may still come to be: then that end waits until a person says who is dead.",
                _ => "",
            }
        ),
    ]
}

/// What is known of a guest that has gone on without all of its memory.
fn incomplete(facts: &Value) -> Vec<String> {
    let waiting = facts["waiting"].as_str().map(|why| format!(" ({why})")).unwrap_or_default();
    vec![format!(
        "machine `{}`: it has gone on at {} in post-copy, and lacks memory that only this process has. It is waited for{waiting}",
        text(facts, "machine"),
        text(facts, "peer")
    )]
}

/// Who has the machine, as far as known.
fn where_it_is(facts: &Value) -> String {
    let newest = &facts["newest"];
    let (ours, theirs) = (facts["epoch"].as_u64(), newest["epoch"].as_u64());
    match (facts["directory"].as_str(), theirs) {
        (None, _) => format!(
            "whether {} runs it nobody can say from here: look there. If it does not, boot the machine from its disks",
            text(facts, "peer")
        ),
        (Some(directory), None) => format!(
            "who has the machine the claims did not say: `godwit-sender ownership show {directory}` once they can be read"
        ),
        (Some(_), Some(epoch)) if Some(epoch) == ours => format!(
            "as far as the claims show, nobody has taken it: epoch {epoch} is still this process's. Once the destination is known to be dead, too: \
             `run` on this host, or `run --take-ownership={epoch}` on another, boots it from its disks"
        ),
        (Some(_), Some(epoch)) => format!(
            "as far as the claims show, {} has it ({}). If that is dead: `run --take-ownership={epoch}` boots it from its disks",
            host(facts),
            text(facts, "owned")
        ),
    }
}

/// The other end, by its name in the claims if it has one.
fn host(facts: &Value) -> &str {
    let claimed = facts["newest"]["claim"]["host"].as_str();
    claimed.filter(|_| facts["newest"]["epoch"] != facts["epoch"]).unwrap_or(text(facts, "peer"))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// What the machine's process refused is a refusal here, too.
fn said(answer: Result<Value, ClientError>) -> Result<Value, Failure> {
    answer.map_err(|error| match error {
        ClientError::Command(why) => Failure::Refused(why.to_string()),
        error => error.into(),
    })
}
