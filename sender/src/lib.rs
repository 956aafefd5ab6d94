//! The program `godwit-sender`: boots a machine and keeps it running until it is sent away; and the client that
//! talks to a running one, also to one that a receiver keeps.

mod cli;
mod client;
mod confirm;
mod doubt;
mod estimate;
mod follow;
mod guest;
mod interrupt;
mod machine_args;
mod migrate;
mod ownership;
mod run;

use std::process::ExitCode;

use clap::Parser;
use godwit_control::console::{EXIT_INTERNAL, EXIT_REFUSED, EXIT_USAGE, say};

use crate::cli::{Cli, Verb};

/// The program: reads the command line, does what it says, and tells by the exit code what came of it.
pub fn main() -> ExitCode {
    // Wrong usage ends the process here, with exit code 2.
    let cli = Cli::parse();
    let result = match &cli.verb {
        Verb::Run(run) => run::run(run, &cli.log, cli.json),
        Verb::Ownership(args) => ownership::show(args, cli.json),
        Verb::Client(verb) => cli.log.start().map_err(Failure::from).and_then(|()| client::execute(verb, cli.json)),
    };
    result.unwrap_or_else(|failure| failure.tell())
}

/// Why a command came to nothing.
#[derive(Debug)]
enum Failure {
    /// It cannot be meant like that.
    Usage(String),
    /// It may not be done, and nothing was.
    Refused(String),
    /// Something went wrong.
    Internal(anyhow::Error),
}

impl Failure {
    fn tell(&self) -> ExitCode {
        match self {
            Failure::Usage(text) => {
                say(format_args!("error: {text}"));
                ExitCode::from(EXIT_USAGE)
            }
            Failure::Refused(text) => {
                say(format_args!("refused: {text}"));
                ExitCode::from(EXIT_REFUSED)
            }
            Failure::Internal(error) => {
                say(format_args!("error: {}", godwit_control::error_chain(error.as_ref())));
                ExitCode::from(EXIT_INTERNAL)
            }
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Internal(error.into())
    }
}
