//! Both spellings of every flag: `--n-layer`, and argparse's `--n_layer`.

use clap::{Arg, Command};

/// Lets every flag of `command` and of its subcommands be spelled with underscores, too. Help and
/// completions show the hyphens alone.
pub fn with_underscores(command: Command) -> Command {
    command.mut_args(aliased).mut_subcommands(with_underscores)
}

fn aliased(arg: Arg) -> Arg {
    let Some(name) = arg.get_long().filter(|name| name.contains('-')).map(|name| name.replace('-', "_")) else {
        return arg;
    };
    // clap wants names that live as long as the process, which is how long they are of use.
    arg.alias(&*name.leak())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_change_and_values_do_not() {
        let flag = |name: &'static str| Arg::new(name).long(name).allow_hyphen_values(true);
        let command = Command::new("bbt").subcommand(Command::new("go").arg(flag("n-layer")).arg(flag("out")));
        let mut command = with_underscores(command);
        for spelling in [["--n_layer", "a_b-c"], ["--n-layer", "a_b-c"], ["--n-layer", "--a_b"], ["--out", "--n_layer"]]
        {
            let given = ["bbt", "go"].into_iter().chain(spelling);
            let matches = command.try_get_matches_from_mut(given).unwrap();
            let matches = matches.subcommand_matches("go").unwrap();
            let value = ["n-layer", "out"].into_iter().find_map(|name| matches.get_one::<String>(name));
            assert_eq!(value.map(String::as_str), Some(spelling[1]));
        }
    }
}
