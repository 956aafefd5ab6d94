//! The program `godwit-receiver`.

use std::process::ExitCode;

fn main() -> ExitCode {
    godwit_receiver::main()
}
