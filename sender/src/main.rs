//! The program `godwit-sender`.

use std::process::ExitCode;

fn main() -> ExitCode {
    godwit_sender::main()
}
