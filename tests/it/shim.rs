//! The C interfaces of the rooms `libtorch` and `kernels` are declared twice: in ffi.rs, which only Rust's compiler
//! reads, and in a header, which only C++'s does. A difference would be undefined behaviour, and no error. So the
//! declarations of ffi.rs are written as C++ here, and a C++ compiler compares them with those of the header.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{ForeignItem, Item, ReturnType, Type};

use super::cuda_kernels::compiler;

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name)
}

fn items(name: &str) -> Vec<Item> {
    let text = fs::read_to_string(source(name)).expect("a source");
    syn::parse_file(&text).expect("Rust").items
}

/// `ty`, as C++ spells it.
fn cpp(ty: &Type) -> String {
    match ty {
        Type::Ptr(pointer) => {
            let constant = if pointer.const_token.is_some() { " const" } else { "" };
            format!("{}{constant}*", cpp(&pointer.elem))
        }
        Type::Path(path) => {
            let name = path.path.segments.last().expect("a name").ident.to_string();
            let known = match name.as_str() {
                "c_char" => "char",
                "c_int" => "int",
                "c_void" => "void",
                "f64" => "double",
                "i64" => "int64_t",
                "u8" => "uint8_t",
                "u16" => "uint16_t",
                "u32" => "uint32_t",
                "u64" => "uint64_t",
                "usize" => "size_t",
                "C_tensor" => "at::Tensor",
                "Recompute" => "bbt_recompute",
                "Drop" => "bbt_drop",
                // An enumeration of numbers.h.
                _ => return format!("bbt::{name}"),
            };
            known.into()
        }
        Type::BareFn(function) => {
            pointer_to_function(&function.output, function.inputs.iter().map(|argument| &argument.ty))
        }
        _ => panic!("ffi.rs has a type that this test cannot spell in C++"),
    }
}

fn pointer_to_function<'a>(output: &ReturnType, inputs: impl Iterator<Item = &'a Type>) -> String {
    let output = match output {
        ReturnType::Default => "void".into(),
        ReturnType::Type(_, ty) => cpp(ty),
    };
    format!("{output} (*)({})", inputs.map(cpp).collect::<Vec<_>>().join(", "))
}

/// The functions that the header declares.
fn declared(header: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(source(header)).expect("a header");
    let code: String = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let names = code.match_indices("bbt_").filter_map(|(at, _)| {
        let end = at + code[at..].find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))?;
        code[end..].starts_with('(').then(|| code[at..end].to_string())
    });
    names.collect()
}

#[test]
fn rust_and_cpp_declare_the_same_interface_to_libtorch() {
    compare("libtorch/shim/shim.h", "libtorch/ffi.rs", &["libtorch/ffi.rs"], &["DeviceType", "Dtype"], 30);
}

#[test]
fn rust_and_cpp_declare_the_same_interface_to_the_kernels() {
    let enumerations = ["kernels/ffi.rs", "kernels/cpu_features.rs"];
    compare("kernels/shim/kernels.h", "kernels/ffi.rs", &enumerations, &["Prologue", "CpuOperation", "CpuFeature"], 8);
}

/// Compares the functions of `header` with those of `ffi`, at least `at_least`, and the enumerations in `enum_files`,
/// which are those of these names, with C++'s.
fn compare(header: &str, ffi: &str, enum_files: &[&str], enum_names: &[&str], at_least: usize) {
    let mut program = format!("#include \"{}\"\n#include <type_traits>\n", source(header).display());
    let mut functions = BTreeSet::new();
    let mut same = |a: &str, b: &str, what: &str| {
        writeln!(program, "static_assert(std::is_same_v<{a}, {b}>, \"{what}\");").unwrap();
    };
    for item in items(ffi) {
        match item {
            Item::ForeignMod(block) => {
                for item in block.items {
                    let ForeignItem::Fn(function) = item else { panic!("ffi.rs declares functions only") };
                    let inputs = function.sig.inputs.iter().map(|argument| match argument {
                        syn::FnArg::Typed(argument) => &*argument.ty,
                        syn::FnArg::Receiver(_) => panic!("a method"),
                    });
                    let name = function.sig.ident.to_string();
                    same(&format!("decltype(&{name})"), &pointer_to_function(&function.sig.output, inputs), &name);
                    functions.insert(name);
                }
            }
            Item::Type(alias) => {
                let name = alias.ident.to_string();
                same(&format!("bbt_{}", name.to_lowercase()), &cpp(&alias.ty), &name);
            }
            _ => {}
        }
    }
    assert!(functions.len() >= at_least, "{functions:?}");
    assert_eq!(functions, declared(header), "{ffi} on the left, {header} on the right");

    let mut enumerations = vec![];
    for item in enum_files.iter().flat_map(|file| items(file)) {
        let Item::Enum(item) = item else { continue };
        let name = format!("bbt::{}", item.ident);
        writeln!(program, "static_assert(std::is_same_v<std::underlying_type_t<{name}>, int>, \"{name}\");").unwrap();
        // A switch without a default: an enumerator that Rust does not have is a warning, which is an error here.
        writeln!(program, "constexpr int number({name} value) {{\n  switch (value) {{").unwrap();
        for (i, variant) in item.variants.iter().enumerate() {
            assert!(variant.discriminant.is_none() && variant.fields.is_empty(), "{name}: numbered from 0");
            writeln!(program, "    case {name}::k{}: return {i};", variant.ident).unwrap();
        }
        writeln!(program, "  }}\n  return -1;\n}}").unwrap();
        for variant in &item.variants {
            let value = format!("{name}::k{}", variant.ident);
            writeln!(program, "static_assert(static_cast<int>({value}) == number({value}), \"{value}\");").unwrap();
        }
        enumerations.push(name);
    }
    assert_eq!(enumerations, enum_names.iter().map(|name| format!("bbt::{name}")).collect::<Vec<_>>());

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("interface.cpp");
    fs::write(&file, &program).unwrap();
    let done = compiler()
        .args(["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"])
        .args([concat!("-D_GLIBCXX_USE_CXX11_ABI=", env!("BBT_TORCH_ABI")), "-isystem", env!("BBT_TORCH_INCLUDE")])
        .arg(&file)
        .output()
        .expect("a C++ compiler");
    assert!(done.status.success(), "{program}\n{}", String::from_utf8_lossy(&done.stderr));
}
