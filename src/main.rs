//! The `bbt` command.

mod allocator;

fn main() -> std::process::ExitCode {
    bbt::cli::main()
}
