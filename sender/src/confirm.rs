//! A person's word that nobody can take back: what it risks is said first, and then it is asked for.

use std::io::{self, BufRead, IsTerminal};

use clap::Args;
use godwit_control::console::say;

use crate::Failure;

/// The options of whatever asks first.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ConfirmArgs {
    /// Do not ask: I have read what it risks. Needed where there is no terminal to ask at
    #[arg(long)]
    pub(crate) yes: bool,
}

impl ConfirmArgs {
    /// Says what is known and what is risked, and goes on only if a person types the machine's name, or has said `--yes`.
    pub(crate) fn ask(self, known_and_risked: &[String], machine: &str) -> Result<(), Failure> {
        for line in known_and_risked {
            say(line);
        }
        if self.yes {
            return Ok(());
        }
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Err(Failure::Refused("nothing was done: there is no terminal to ask at, so give --yes".into()));
        }
        say(format_args!("Type the name of the machine, {machine}, to do it; anything else leaves all as it is."));
        typed(machine, &mut io::stdin().lock())
    }
}

fn typed(machine: &str, input: &mut impl BufRead) -> Result<(), Failure> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    match line.trim() == machine {
        true => Ok(()),
        false => Err(Failure::Refused(format!("nothing was done: that is not `{machine}`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machine_s_name_will_do() {
        assert!(typed("fw1", &mut "fw1\n".as_bytes()).is_ok());
        for wrong in ["", "\n", "yes\n", "y\n", "fw\n", "fw12\n", "FW1\n"] {
            assert!(matches!(typed("fw1", &mut wrong.as_bytes()), Err(Failure::Refused(_))), "{wrong:?}");
        }
    }

    #[test]
    fn without_a_terminal_a_person_has_to_have_said_yes() {
        let risk = ["RISK: two guests".to_owned()];
        assert!(ConfirmArgs { yes: true }.ask(&risk, "fw1").is_ok());
        if !io::stdin().is_terminal() {
            assert!(matches!(ConfirmArgs { yes: false }.ask(&risk, "fw1"), Err(Failure::Refused(_))));
        }
    }
}
