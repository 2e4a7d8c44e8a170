"""What language a file is written in, by its name: the one vocabulary that sources, filters and code order share.

Programming, configuration and data languages have the names of GitHub's linguist in lower case ("python", "c++",
"objective-c"); formats of prose are "text", "markdown", "restructuredtext", "asciidoc", "org" and "html"; natural
languages are ISO 639-1 codes ("en"). A name tells one language: where an ending is shared (".h", ".m", ".pl", ".ts"),
the most common one is meant.
"""

from __future__ import annotations

import re

#: Formats of prose, and the endings of their files.
_PROSE = {
    "text": "txt text",
    "markdown": "md markdown mdown mkd mdx",
    "restructuredtext": "rst rest",
    "asciidoc": "adoc asciidoc",
    "org": "org",
    "html": "html htm xhtml",
}
#: Languages that people or programs write for machines.
_CODE = {
    "ada": "adb ads ada",
    "agda": "agda",
    "applescript": "applescript",
    "assembly": "s asm nasm",
    "awk": "awk gawk",
    "batchfile": "bat cmd",
    "bitbake": "bb bbclass bbappend",
    "c": "c h",
    "c#": "cs csx",
    "c++": "cpp cc cxx c++ hpp hh hxx h++ ipp tpp inl",
    "clojure": "clj cljs cljc edn",
    "cmake": "cmake",
    "coffeescript": "coffee",
    "common lisp": "lisp lsp cl asd",
    "crystal": "cr",
    "css": "css",
    "csv": "csv tsv",
    "cuda": "cu cuh",
    "cython": "pyx pxd pxi",
    "d": "d di",
    "dart": "dart",
    "diff": "diff patch",
    "dockerfile": "dockerfile",
    "elixir": "ex exs",
    "elm": "elm",
    "emacs lisp": "el",
    "erlang": "erl hrl escript",
    "f#": "fs fsi fsx",
    "fortran": "f f77 f90 f95 f03 f08 for",
    "glsl": "glsl vert frag comp geom",
    "go": "go",
    "gradle": "gradle",
    "graphql": "graphql gql",
    "groovy": "groovy",
    "haskell": "hs lhs",
    "hcl": "hcl tf tfvars",
    "hlsl": "hlsl fx",
    "html+django": "jinja jinja2 j2",
    "idris": "idr",
    "ini": "ini cfg conf properties editorconfig desktop",
    "java": "java",
    "javascript": "js mjs cjs jsx",
    "json": "json json5 jsonc geojson webmanifest",
    "julia": "jl",
    "jupyter notebook": "ipynb",
    "kotlin": "kt kts",
    "lean": "lean",
    "less": "less",
    "llvm": "ll",
    "lua": "lua",
    "m4": "m4 ac",
    "makefile": "mk mak make",
    "matlab": "matlab",
    "meson": "meson",
    "mlir": "mlir",
    "nim": "nim nims",
    "nix": "nix",
    "objective-c": "m",
    "objective-c++": "mm",
    "ocaml": "ml mli mll mly",
    "pascal": "pas pp lpr dpr",
    "perl": "pl pm",
    "php": "php phtml php5",
    "pod": "pod",
    "postscript": "ps eps",
    "powershell": "ps1 psm1 psd1",
    "prolog": "pro prolog",
    "protocol buffer": "proto",
    "puppet": "puppet",
    "python": "py pyi pyw",
    "qml": "qml",
    "r": "r rmd",
    "racket": "rkt",
    "raku": "raku rakumod p6",
    "ruby": "rb rake gemspec",
    "rust": "rs",
    "sass": "sass",
    "scala": "scala sbt sc",
    "scheme": "scm ss sld",
    "scss": "scss",
    "shell": "sh bash zsh ksh fish bats",
    "solidity": "sol",
    "sql": "sql ddl",
    "standard ml": "sml",
    "starlark": "bzl star",
    "svelte": "svelte",
    "svg": "svg",
    "swift": "swift",
    "systemverilog": "sv svh",
    "tcl": "tcl tk",
    "tex": "tex sty cls ltx bib dtx",
    "thrift": "thrift",
    "toml": "toml",
    "typescript": "ts tsx mts cts",
    "verilog": "v vh",
    "vhdl": "vhd vhdl",
    "vim script": "vim",
    "visual basic": "vb bas",
    "vue": "vue",
    "webassembly": "wat wast",
    "xml": "xml xsd xsl xslt rng dtd plist csproj vcxproj wsdl",
    "yacc": "y yy",
    "lex": "l lex",
    "yaml": "yaml yml",
    "zig": "zig",
}
#: Whole names, in lower case and without an ending that only says "text".
_NAMES = {
    "dockerfile": "dockerfile",
    "containerfile": "dockerfile",
    "makefile": "makefile",
    "gnumakefile": "makefile",
    "kbuild": "makefile",
    "cmakelists.txt": "cmake",
    "meson.build": "meson",
    "meson_options.txt": "meson",
    "build": "starlark",
    "build.bazel": "starlark",
    "workspace": "starlark",
    "workspace.bazel": "starlark",
    "sconstruct": "python",
    "sconscript": "python",
    "wscript": "python",
    "gemfile": "ruby",
    "rakefile": "ruby",
    "podfile": "ruby",
    "vagrantfile": "ruby",
    "jenkinsfile": "groovy",
    "configure.ac": "m4",
    "kconfig": "kconfig",
    "go.mod": "go module",
    "go.sum": "go checksums",
    "cargo.lock": "toml",
    "poetry.lock": "toml",
    "uv.lock": "toml",
    "pipfile": "toml",
    "pipfile.lock": "json",
    "composer.lock": "json",
    "yarn.lock": "yaml",
    "gemfile.lock": "ini",
    "requirements.txt": "pip requirements",
    ".bashrc": "shell",
    ".profile": "shell",
    ".zshrc": "shell",
    ".gitignore": "ignore list",
    ".dockerignore": "ignore list",
    ".gitattributes": "ini",
    ".gitmodules": "ini",
    ".gitconfig": "ini",
    ".editorconfig": "ini",
    ".flake8": "ini",
    ".clang-format": "yaml",
    ".clang-tidy": "yaml",
    ".babelrc": "json",
    ".eslintrc": "json",
    ".prettierrc": "json",
}
#: Files that explain a project, whose names often have no ending.
_EXPLAINING = re.compile(
    r"(read[-_.]?me|licen[cs]e|copying|copyright|notice|authors|contributors|maintainers|credits|thanks|changes|"
    r"changelog|news|history|install|hacking|todo|faq|patents|unlicense)([-_.][a-z0-9-]*)?"
)
#: What else the languages are called by data sets and people.
_ALIASES = {
    "cpp": "c++",
    "c plus plus": "c++",
    "cs": "c#",
    "csharp": "c#",
    "c-sharp": "c#",
    "fsharp": "f#",
    "f-sharp": "f#",
    "golang": "go",
    "js": "javascript",
    "ts": "typescript",
    "tsx": "typescript",
    "jsx": "javascript",
    "py": "python",
    "python3": "python",
    "objc": "objective-c",
    "bash": "shell",
    "sh": "shell",
    "shellscript": "shell",
    "yml": "yaml",
    "md": "markdown",
    "rst": "restructuredtext",
    "plain text": "text",
    "plaintext": "text",
    "latex": "tex",
    "docker": "dockerfile",
    "make": "makefile",
    "protobuf": "protocol buffer",
    "jupyter": "jupyter notebook",
    "jupyter-notebook": "jupyter notebook",
    "vbnet": "visual basic",
    "visual basic .net": "visual basic",
    "viml": "vim script",
}

PROSE = frozenset(_PROSE)
CODE = frozenset({*_CODE, *_NAMES.values()})
_BY_ENDING = {
    ending: name for table in (_PROSE, _CODE) for name, endings in table.items() for ending in endings.split()
}
_NATURAL = re.compile(r"([a-z]{2})[-_](?:[a-z]{2}|[a-z]{4}|\d{3})(?:[-_][a-z0-9]+)*")


def of_path(path: str) -> str | None:
    """Language of a file by its name; None where the name tells none.

    >>> [of_path(p) for p in ("src/a.PY", "x/CMakeLists.txt", "README", "a.b/Makefile.in", "core.1234", "notes")]
    ['python', 'cmake', 'text', 'makefile', None, None]
    """
    name = path.rsplit("/", 1)[-1].lower()
    stem, dot, ending = name.removesuffix(".in").rpartition(".")
    if known := _NAMES.get(name) or _NAMES.get(name.removesuffix(".in")):
        return known
    if dot and stem and (known := _BY_ENDING.get(ending)):
        return known
    if name.startswith(("dockerfile.", "makefile.")):
        return name.split(".")[0]
    return "text" if _EXPLAINING.fullmatch(name) else None


def is_code(language: str | None) -> bool:
    """Whether a language is one for machines: programming, configuration, data. Prose, natural languages and what is
    not known are none."""
    return language in CODE


def named(name: str) -> str:
    """The name used here of a language as some data set states it: one of `CODE` or `PROSE`, or the primary part of a
    natural language's tag. What is not known stays as it is, in lower case.

    >>> [named(n) for n in ("Python", "C-Sharp", "cpp", "en-US", "zh_Hans", "Brainfuck")]
    ['python', 'c#', 'c++', 'en', 'zh', 'brainfuck']
    """
    name = " ".join(name.lower().split())
    if name in CODE or name in PROSE:
        return name
    tag = _NATURAL.fullmatch(name)
    return tag[1] if tag else _ALIASES.get(name, name)
