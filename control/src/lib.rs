//! Godwit's control plane towards people and programs.
//!
//! | module | what |
//! |---|---|
//! | [`qmp`] | the control socket: QMP messages, server and client |
//! | [`keeper`] | keeps a machine, answers the control socket, runs outgoing moves |
//! | [`parameters`] | the knobs of a move under the names that QMP has for them |
//! | [`outcome`] | how a move ended, for programs and for people |
//! | [`display`], [`summary`] | the same for people: while it runs, and when it has ended |
//! | [`forecast`] | a prediction, for people |
//! | [`report`] | moves as pages to be looked at |
//! | [`claims`] | where a machine's claims lie, and what they say, for people |
//! | [`console`] | stdout, stderr, logging: what the programs have in common |
//! | [`units`] | numbers with their units, as options and files write them |

pub mod claims;
pub mod console;
pub mod display;
pub mod forecast;
pub mod keeper;
pub mod outcome;
pub mod parameters;
pub mod qmp;
pub mod report;
pub mod summary;
pub mod units;

/// An error and everything that caused it, on one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors already say what caused them.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
