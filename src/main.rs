//! The `bbt` command.

fn main() -> std::process::ExitCode {
    bbt::cli::main()
}
