//! The `bbt` command.

mod allocator;
mod working_directory;

fn main() -> std::process::ExitCode {
    bbt::cli::main()
}
