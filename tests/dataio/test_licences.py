"""Licences: texts are told whatever they are wrapped in, wordings mean what they say, and doubt never permits."""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import textwrap
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio import licences
from dataio.licences import (
    PERMISSIVE,
    identify,
    is_licence_file,
    is_package_metadata,
    of_files,
    permissive,
    stated,
    texts,
)
from dataio.licences.expressions import all_of, any_of, canonical, names
from dataio.licences.texts import known, table
from dataio.licences.wordings import normalise

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""
ISC = """Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby
granted, provided that the above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT,
INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF
THIS SOFTWARE."""
CLAUSES = [
    """Redistributions of source code must retain the above copyright notice, this list of conditions and the following
disclaimer.""",
    """Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the
following disclaimer in the documentation and/or other materials provided with the distribution.""",
    """Neither the name of {owner} nor the names of its contributors may be used to endorse or promote products derived
from this software without specific prior written permission.""",
]
BSD_FOOT = """THIS SOFTWARE IS PROVIDED BY {holders} "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT
LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT
SHALL {holders} BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING,
BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING
NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH
DAMAGE."""


def bsd(
    clauses: int, owner: str = "the copyright holder", holders: str = "THE COPYRIGHT HOLDERS AND CONTRIBUTORS"
) -> str:
    start = (
        "Redistribution and use in source and binary forms, with or without modification, are permitted provided that"
    )
    listed = "\n\n".join(f"{i + 1}. {clause}" for i, clause in enumerate(CLAUSES[:clauses]))
    text = f"{start} the following conditions are met:\n\n{listed}\n\n{BSD_FOOT}"
    return text.format(owner=owner, holders=holders)


TEXTS = {"MIT": MIT, "ISC": ISC, "BSD-2-Clause": bsd(2), "BSD-3-Clause": bsd(3)}
APACHE = (Path(__file__).parents[2] / "LICENSE").read_text("utf-8")
SYSTEM = Path("/usr/share/common-licenses")


def worn(text: str, generator: random.Random) -> str:
    """The same licence as people paste it: wrapped, commented, quoted, with owners before it."""
    owners = [f"Copyright (c) {2000 + i} {'Jane Doe, Acme & Sons GmbH <jane@acme.com>'[: 9 * i]}" for i in range(1, 5)]
    text = text.replace('"', generator.choice(['"', "``", "“", "'"]))
    lines = textwrap.wrap(" ".join(text.split()), generator.randint(40, 200))
    lines = ["The Licence", "", *owners[: generator.randint(0, 4)], "All rights reserved.", "", *lines]
    mark = generator.choice(["", "# ", " * ", "// ", "-- ", "    ", ";; "])
    return generator.choice(["\n", "\r\n"]).join(mark + line for line in lines)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_told_however_it_is_worn(name: str) -> None:
    generator = random.Random(name)
    for _ in range(100):
        text = worn(TEXTS[name], generator)
        assert identify(text) == name, text
        assert stated(text + "\n\nint main() { return 0; }\n") == name, text


def test_names_filled_in_do_not_change_what_it_is() -> None:
    owners = ["the University", "Google Inc.", "the FooBar Widget Development Team and Associates", "NumPy Developers"]
    for owner in owners:
        holders = ["THE REGENTS AND CONTRIBUTORS", f"{owner.upper()} ''AS IS'' AND CONTRIBUTORS", "THE AUTHOR"]
        assert [identify(bsd(3, owner, said)) for said in holders] == ["BSD-3-Clause"] * 3


def test_texts_of_the_system_are_told() -> None:
    if not SYSTEM.is_dir():
        pytest.skip(f"{SYSTEM} is a folder of Debian")
    versions = {
        "GPL-1": "GPL-1.0",
        "GPL-2": "GPL-2.0",
        "GPL-3": "GPL-3.0",
        "LGPL-2": "LGPL-2.0",
        "LGPL-2.1": "LGPL-2.1",
    }
    expected = {
        file: f"{stem}-only" for file, stem in {**versions, "LGPL-3": "LGPL-3.0", "GFDL-1.3": "GFDL-1.3"}.items()
    }
    expected |= {"Artistic": "Artistic-1.0-Perl", "BSD": "BSD-3-Clause"}
    expected |= {name: name for name in ("Apache-2.0", "CC0-1.0", "MPL-1.1", "MPL-2.0")}
    found = {
        name: identify((SYSTEM / name).read_text("utf-8", "replace")) for name in expected if (SYSTEM / name).is_file()
    }
    assert found == {name: expected[name] for name in found}
    assert found


def test_the_first_of_several_texts_is_the_files_own() -> None:
    assert identify(f"{bsd(3)}\n\nBundled parts:\n\n{MIT}\n\n{APACHE}") == "BSD-3-Clause"
    assert identify(f"{MIT}\n\n----\n\n{bsd(2)}") == "MIT"
    unknown = "The licensee shall pay whatever the licensor may ask for, each time anew. " * 60
    assert identify(f"{unknown}\n\nThird party notices:\n\n{MIT}") is None


def test_what_is_no_licence_is_none() -> None:
    for text in ("", "a", "x " * 500, MIT[:300], "THE SOFTWARE IS PROVIDED AS IS", textwrap.dedent(__doc__ or "")):
        assert identify(text) is None


def test_conditions_added_to_a_permissive_text_are_told() -> None:
    evil = MIT.replace("\n\nTHE SOFTWARE", "\n\nThe Software shall be used for Good, not Evil.\n\nTHE SOFTWARE")
    commons = f'"Commons Clause" License Condition v1.0\n\nWithout limiting other conditions ...\n\n{APACHE}'
    for text in (evil, commons, f"{MIT}\n\nNot for commercial use."):
        assert not permissive(of_files({"LICENSE": text}) or "")
    assert permissive(of_files({"LICENSE": MIT}) or "")


def test_the_table_is_what_the_texts_give() -> None:
    stored = json.loads((Path(licences.__file__).parent / "texts.json").read_text("utf-8"))
    made = json.loads(table({"Apache-2.0": APACHE, "MIT": MIT}))
    for name, (rate, packed) in made.items():
        ours, theirs = set(texts._unpacked(packed).tolist()), set(texts._unpacked(stored[name][1]).tolist())
        assert rate == stored[name][0]
        assert len(ours & theirs) >= 0.95 * len(ours | theirs)  # but for titles and an appendix
    assert known() == frozenset(stored) >= {"MIT", "Apache-2.0", "GPL-3.0-only", "CC-BY-SA-4.0"}
    assert all(canonical(name) == name for name in known())


WORDINGS = {
    "MIT": [
        "MIT",
        "mit",
        "MIT License",
        "The MIT License (MIT)",
        "License :: OSI Approved :: MIT License",
        "Expat",
        "MIT/X11",
    ],
    "Apache-2.0": ["Apache 2", "Apache License, Version 2.0", "Apache Software License", "ASL 2", "apache-2.0"],
    "BSD-3-Clause": ["New BSD License", "BSD 3-Clause", "3-Clause BSD License", "Modified BSD License", "BSD-3"],
    "BSD-2-Clause": ["Simplified BSD", "BSD 2-Clause License", 'BSD 2-Clause "Simplified" License'],
    "LicenseRef-BSD": ["BSD", "BSD License", "License :: OSI Approved :: BSD License"],
    "GPL-2.0-only": ["GPLv2", "GPL-2.0", "GNU General Public License v2.0", "http://www.gnu.org/licenses/gpl-2.0.html"],
    "GPL-2.0-or-later": [
        "GPLv2+",
        "GPL v2 or later",
        "GPL-2+",
        "GPL-2.0+",
        "GNU General Public License, version 2 or any later version",
    ],
    "GPL-3.0-or-later": ["GPLv3+", "GNU General Public License v3 or later (GPLv3+)"],
    "GPL-1.0-or-later": ["GPL", "GNU GPL", "GNU General Public License (GPL)"],
    "LGPL-2.1-or-later": ["LGPL-2.1+", "GNU Lesser General Public License v2.1 or later"],
    "LGPL-3.0-only": ["LGPLv3", "GNU Lesser General Public License v3 (LGPLv3)"],
    "AGPL-3.0-only": ["AGPL-3.0", "GNU Affero General Public License v3"],
    "MPL-2.0": ["MPL 2.0", "Mozilla Public License 2.0 (MPL 2.0)", "https://www.mozilla.org/en-US/MPL/2.0/"],
    "CC-BY-SA-4.0": ["CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/deed.en"],
    "CC-BY-NC-ND-3.0": ["CC-BY-NC-ND-3.0", "Creative Commons Attribution-NonCommercial-NoDerivs 3.0 Unported"],
    "Unlicense": ["The Unlicense", "The Unlicense (Unlicense)"],
    "LicenseRef-proprietary": ["UNLICENSED", "Proprietary", "License :: Other/Proprietary License"],
    "Apache-2.0 OR MIT": ["MIT/Apache-2.0", "MIT or Apache 2.0", "Your choice of MIT or Apache License 2.0"],
    "GPL-3.0-only OR MIT": ["MIT or GPLv3", "gplv3 | mit"],
    "Apache-2.0 AND MIT": ["mit, apache-2.0"],
    "Apache-2.0 WITH LLVM-exception": ["apache-2.0 with llvm-exception"],
}


def test_wordings_mean_what_they_say() -> None:
    assert {(name, said): normalise(said) for name, all_said in WORDINGS.items() for said in all_said} == {
        (name, said): name for name, all_said in WORDINGS.items() for said in all_said
    }


@pytest.mark.parametrize(
    "said", ["", " ", "UNKNOWN", "see LICENSE", "Dual License", "not GPL", "MIT OR", "Freeware", "OSI Approved"]
)
def test_what_says_nothing_is_none(said: str) -> None:
    assert normalise(said) is None


NAMES = ["MIT", "GPL-2.0-only", "ISC", "MPL-2.0", "Apache-2.0 WITH LLVM-exception", "Zlib"]
EXPRESSIONS = st.recursive(
    st.sampled_from(NAMES),
    lambda inner: st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(lambda three: f"({' '.join(three)})"),
    max_leaves=8,
)


@given(EXPRESSIONS, st.sets(st.sampled_from(["MIT", "GPL-2.0-only", "ISC", "MPL-2.0", "Apache-2.0", "Zlib"])))
@settings(max_examples=300, deadline=None)
def test_permissive_is_the_value_of_the_expression(expression: str, allowed: set[str]) -> None:
    words = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    tokens = re.findall(r"[()]|[\w.-]+", expression.replace(" WITH LLVM-exception", ""))
    value = eval(" ".join(words.get(token, str(token in allowed)) for token in tokens))
    assert permissive(expression, frozenset(allowed)) == value
    assert permissive(canonical(expression) or "", frozenset(allowed)) == value


@given(st.lists(EXPRESSIONS, min_size=1, max_size=4), st.sets(st.sampled_from(NAMES)))
@settings(max_examples=200, deadline=None)
def test_joined_expressions_hold_as_all_or_any_of_them_do(expressions: list[str], allowed: set[str]) -> None:
    single = [permissive(one, frozenset(allowed)) for one in expressions]
    assert permissive(all_of(expressions) or "", frozenset(allowed)) == all(single)
    assert permissive(any_of(expressions) or "", frozenset(allowed)) == any(single)


@cache
def other_parser() -> Any:
    theirs = pytest.importorskip("license_expression", reason="license-expression, the oracle, is not installed")
    return theirs.get_spdx_licensing()


@given(EXPRESSIONS)
@settings(max_examples=100, deadline=None)
def test_the_canonical_form_agrees_with_another_parser(expression: str) -> None:
    licensing = other_parser()
    assert licensing.is_equivalent(licensing.parse(canonical(expression)), licensing.parse(expression))


def test_permissive_names_are_spdx_and_leave_out_copyleft() -> None:
    assert all(canonical(name) == name for name in PERMISSIVE)
    assert not [name for name in PERMISSIVE if re.search(r"GPL|MPL|-SA|-NC|-ND|EPL|CDDL|OSL|EUPL|SSPL|BUSL|OFL", name)]


HEADERS = {
    "GPL-2.0-or-later": """/* it under the terms of the GNU General Public License as published by
 * the Free Software Foundation; either version 2 of the License, or
 * (at your option) any later version. */""",
    "GPL-2.0-only": """// modify it under the terms of the GNU General Public License version 2 as
// published by the Free Software Foundation.""",
    "LGPL-2.1-or-later": """# under the terms of the GNU Lesser General Public
# License as published by the Free Software Foundation; either
# version 2.1 of the License, or (at your option) any later version.""",
    "AGPL-3.0-or-later": """;; it under the terms of the GNU Affero General Public License as
;; published by the Free Software Foundation, either version 3 of the
;; License, or (at your option) any later version.""",
    "Apache-2.0": """# Licensed under the Apache License, Version 2.0 (the "License");
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.""",
    "Apache-2.0 OR MIT": """// Licensed under the Apache License, Version 2.0 <LICENSE-APACHE or
// http://www.apache.org/licenses/LICENSE-2.0> or the MIT license
// <LICENSE-MIT or http://opensource.org/licenses/MIT>, at your
// option. This file may not be copied, modified, or distributed
// except according to those terms.""",
    "GPL-2.0-or-later OR LGPL-2.1-or-later OR MPL-1.1": """/* The contents of this file are subject to the
 * Mozilla Public License Version 1.1 (the "License").
 * Alternatively, the contents of this file may be used under the terms of
 * either the GNU General Public License Version 2 or later (the "GPL"), or
 * the GNU Lesser General Public License Version 2.1 or later (the "LGPL"),""",
    "GPL-2.0-only OR MIT": "/*! x v1 | Dual licensed under the MIT or GPL Version 2 licenses. */",
    "MIT": "/**\n * @license MIT\n */",
    "LicenseRef-BSD": "// Use of this source code is governed by a BSD-style\n// license, see the LICENSE file.",
    "MPL-2.0": "/* This Source Code Form is subject to the terms of the Mozilla Public\n * License, v. 2.0. */",
    "BSL-1.0": "// Distributed under the Boost Software License, Version 1.0.\n",
    "LicenseRef-proprietary": "# Use without a license is strictly prohibited.\n# Proprietary and confidential.",
    "LicenseRef-public-domain": "# This file is placed in the public domain.\n",
    "GPL-2.0-only WITH Linux-syscall-note": "/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */\n",
    "Apache-2.0 AND MIT": "# SPDX-License-Identifier: Apache-2.0\n<!-- SPDX-License-Identifier: MIT -->\n",
    "LicenseRef-My-Own": "// SPDX-License-Identifier: My Own */\n",
    "BSD-3-Clause AND GPL-2.0-only": f"under the terms of the GNU General Public License, version 2.\n\n{bsd(3)}",
}


def test_headers_state_what_they_say() -> None:
    assert {name: stated(header) for name, header in HEADERS.items()} == {name: name for name in HEADERS}


def test_talk_of_licences_states_none() -> None:
    for text in (
        "The GNU General Public License is a widely used licence. It was written by Stallman.",
        "import licensing\n\ndef license(x): return 'licensed drivers'\n",
        "plates and licenses: see the office\n",
        "",
    ):
        assert stated(text) is None
    assert stated("x = 1\n" * 2000 + HEADERS["MIT"]) is None  # not in the first lines


def test_file_names_tell_licences_and_metadata() -> None:
    yes = [
        "LICENSE",
        "license.txt",
        "LICENCE.md",
        "LICENSE-APACHE",
        "COPYING.LESSER",
        "a/UNLICENSE",
        "LICENSES/MIT.txt",
        "MIT-LICENSE",
    ]
    no = [
        "license.py",
        "licenses.json",
        "relicense.txt",
        "LICENSES/README.md",
        "copying.go",
        "license_check.js",
        "README",
    ]
    assert [name for name in yes + no if is_licence_file(name)] == yes
    assert [is_package_metadata(name) for name in ("a/METADATA", "x.gemspec", "Cargo.toml", "go.mod", "setup.py")] == [
        True
    ] * 3 + [False] * 2


BOTH = {"LICENSE-MIT": MIT, "LICENSE-APACHE": APACHE}
CLASSIFIED = "Name: x\nClassifier: License :: OSI Approved :: BSD License\n\nbody"
FOLDED = "License: " + MIT.replace("\n\n", "\n").replace("\n", "\n  ") + "\n\n"
BY_CLASSIFIER = 'license = {file = "L"}\nclassifiers = ["License :: OSI Approved :: MIT License"]'
REPOSITORIES: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"README.md": MIT}, None),
    ({"LICENSE": MIT}, "MIT"),
    ({"LICENSE": MIT, "vendor/x/LICENSE": bsd(3)}, "MIT"),
    (BOTH, "Apache-2.0 AND MIT"),
    (BOTH | {"Cargo.toml": '[package]\nlicense = "MIT/Apache-2.0"'}, "Apache-2.0 OR MIT"),
    ({"package.json": '{"license": "ISC"}', "LICENSE": MIT}, "ISC AND MIT"),
    ({"package.json": '{"licenses": [{"type": "MIT"}, {"type": "GPL-2.0"}]}'}, "GPL-2.0-only OR MIT"),
    ({"package.json": '{"license": "SEE LICENSE IN x"}', "LICENSE": MIT}, "MIT"),
    ({"package.json": '{"license": "UNLICENSED"}'}, "LicenseRef-proprietary"),
    ({"package.json": '{"license": "GPL-3.0-or-later"}', "LICENSE": MIT}, "GPL-3.0-or-later AND MIT"),
    ({"composer.json": '{"license": ["LGPL-2.1-only", "GPL-3.0-or-later"]}'}, "GPL-3.0-or-later OR LGPL-2.1-only"),
    ({"x.dist-info/METADATA": CLASSIFIED, "x.dist-info/licenses/LICENSE": bsd(3)}, "BSD-3-Clause"),
    ({"METADATA": "License-Expression: MIT\nLicense: GPL\n\n"}, "MIT"),
    ({"PKG-INFO": FOLDED}, "MIT"),
    ({"pyproject.toml": '[project]\nlicense = {text = "Apache 2.0"}'}, "Apache-2.0"),
    ({"pyproject.toml": f"[project]\n{BY_CLASSIFIER}"}, "MIT"),
    ({"x.gemspec": "Gem::Specification.new do |s|\n  s.license = 'MIT'\n"}, "MIT"),
    ({"LICENSE": HEADERS["Apache-2.0"]}, "Apache-2.0"),
    ({"LICENSE": APACHE + "\n---- LLVM Exceptions to the Apache 2.0 License ----\n"}, "Apache-2.0 WITH LLVM-exception"),
]


def test_a_repository_is_under_all_that_its_files_say() -> None:
    assert [of_files(files) for files, _ in REPOSITORIES] == [expected for _, expected in REPOSITORIES]


def test_installed_distributions_agree_with_their_own_expressions() -> None:
    """Every name that an expression has is one that the files give back; the texts name what the expression does."""
    checked = 0
    for distribution in importlib.metadata.distributions():
        said = distribution.metadata.get("License-Expression")
        files = [file for file in distribution.files or [] if is_licence_file(str(file)) and ".dist-info" in str(file)]
        if not said or len(files) != 1 or canonical(said) is None or len(names(canonical(said) or "")) != 1:
            continue
        text = Path(str(distribution.locate_file(files[0]))).read_text("utf-8", "replace")
        if (found := identify(text)) is not None:
            checked += 1
            assert of_files({"METADATA": f"License-Expression: {said}\n\n", "LICENSE": text}) is not None
            if said in known():
                assert found == said or {found, said} == {"PSF-2.0", "Python-2.0"}, distribution.metadata["Name"]
    print(f"{checked} distributions")
    if checked == 0:
        pytest.skip("no installed distribution states an SPDX expression and has its text")


def test_hostile_files_are_read_in_bounded_time_and_never_raise() -> None:
    start = time.process_time()
    deep = "[" * 100_000
    hostile = [
        deep,
        '{"license": ' + deep,
        '{"license": 7}',
        '{"license": [{"type": {}}]}',
        "[]",
        "7",
        '"x"',
        "\0" * 1000,
        "x = ",
    ]
    for name in ("package.json", "composer.json", "Cargo.toml", "pyproject.toml", "METADATA", "x.gemspec", "LICENSE"):
        for text in hostile:
            assert of_files({name: text}) is None
    for piece in (
        "(",
        "MIT OR ",
        "either ",
        "licensed under ",
        "gpl ",
        "a/",
        ",",
        "license: ",
        "nc-",
        "general public ",
        "1.",
    ):
        normalise(piece * 100_000), normalise(piece * (900 // len(piece))), stated(piece * 100_000)
        permissive(piece * 100_000), identify(piece * 50_000)
    assert time.process_time() - start < 30  # two seconds and a half when written
