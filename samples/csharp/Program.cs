// Run an exported text model in C#: one adapter by ONNX Runtime's own OrtLoraAdapter, or another one in each row by plain inputs.
//
//   dotnet run --project samples/csharp -- FOLDER one NAME < ids           every row by adapter NAME
//   dotnet run --project samples/csharp -- FOLDER rows NAME,NAME,- < ids   row by row; - is the base
//
// Standard input has a line of token ids for each row; shorter rows are padded on the right. A line of logits comes out for each
// row; of a decoder, those of its last token. Exit codes: 2 usage, 3 refused.
using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

public static class Program
{
    public static int Main(string[] arguments)
    {
        var ids = new List<long[]>();
        for (string line; (line = Console.ReadLine()) != null;)
            ids.Add(line.Split(new[] { ' ' }, StringSplitOptions.RemoveEmptyEntries).Select(long.Parse).ToArray());
        bool isOne = arguments.Length == 3 && arguments[1] == "one" && arguments[2] != "-" && !arguments[2].Contains(",");
        bool isRows = arguments.Length == 3 && arguments[1] == "rows" && arguments[2].Split(',').Length == ids.Count;
        if (!(isOne || isRows) || ids.Count == 0)
        {
            Console.Error.WriteLine("usage: FOLDER one NAME < ids, or FOLDER rows NAME,NAME,- < ids with a name for each row");
            return 2;
        }
        try
        {
            Run(arguments[0], isOne, arguments[2].Split(','), ids);
            return 0;
        }
        catch (RefusedException error)
        {
            Console.Error.WriteLine("refused: " + error.Message);
            return 3;
        }
    }

    static void Run(string folder, bool isOne, string[] names, List<long[]> ids)
    {
        var settings = new SessionOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR }; // optional inputs warn
        using (var session = new InferenceSession(Path.Combine(folder, "model.onnx"), settings))
        using (var options = new RunOptions())
        {
            var ofAdapters = new Dictionary<string, Declared>();
            foreach (var each in session.InputMetadata.Concat(session.OverridableInitializerMetadata))
                if (Kind.Of(each.Key) != null) ofAdapters[each.Key] = DeclaredOf(each.Value);
            var feeds = OwnInputs(session, ids);
            var adapters = new Dictionary<string, Dictionary<string, AdapterTensor>>();
            OrtLoraAdapter active = null; // must outlive the run
            foreach (var name in names.Where(name => name != "-").Distinct())
            {
                var file = Path.Combine(folder, "adapters", name + ".onnx_adapter");
                adapters[name] = AdapterFile.Read(file);
                Rows.RequireFit(adapters[name], ofAdapters, file);
                if (!isOne) continue;
                active = OrtLoraAdapter.Create(file, null);
                options.AddActiveLoraAdapter(active);
            }
            var none = new Dictionary<string, AdapterTensor>();
            var rows = names.Select(name => name == "-" ? none : adapters[name]).ToList();
            if (!isOne)
                foreach (var input in ofAdapters.Where(input => rows.Any(row => row.ContainsKey(input.Key))))
                    feeds[input.Key] = Rows.Stacked(input.Key, input.Value, rows);
            // A graph of `--inputs required` has no defaults of its own: what no adapter brings has rank 0.
            foreach (var name in session.InputMetadata.Keys.Where(name => ofAdapters.ContainsKey(name) && !feeds.ContainsKey(name)))
                if (!(isOne && rows[0].ContainsKey(name))) feeds[name] = Rows.Stacked(name, ofAdapters[name], new[] { none });
            Print(session, options, feeds, ids);
            if (active != null) active.Dispose();
        }
    }

    static void Print(InferenceSession session, RunOptions options, Dictionary<string, AdapterTensor> feeds, List<long[]> ids)
    {
        var values = feeds.ToDictionary(each => each.Key, each => ValueOf(each.Value));
        using (var results = session.Run(options, values, new[] { "logits" }))
        {
            var shape = results[0].GetTensorTypeAndShape().Shape;
            var logits = results[0].GetTensorDataAsSpan<float>().ToArray();
            int n = (int)shape[shape.Length - 1], perRow = logits.Length / (int)shape[0];
            for (int row = 0; row < shape[0]; row++)
            {
                int last = shape.Length == 3 ? ids[row].Length - 1 : 0;
                var own = logits.Skip(row * perRow + last * n).Take(n);
                Console.WriteLine(string.Join(" ", own.Select(each => each.ToString("R", CultureInfo.InvariantCulture))));
            }
        }
        foreach (var value in values.Values) value.Dispose();
    }

    static Declared DeclaredOf(NodeMetadata metadata)
    {
        return new Declared { Type = (int)metadata.ElementDataType, Dims = metadata.Dimensions.Select(dim => (long)dim).ToArray() };
    }

    // Padded ids with what follows from them: the mask, token types, positions, and a cache of length 0.
    static Dictionary<string, AdapterTensor> OwnInputs(InferenceSession session, List<long[]> ids)
    {
        int longest = ids.Max(row => row.Length);
        var known = new Dictionary<string, Func<long[], int, long>>
        {
            { "input_ids", (row, i) => i < row.Length ? row[i] : 0 },
            { "attention_mask", (row, i) => i < row.Length ? 1 : 0 },
            { "token_type_ids", (row, i) => 0 },
            { "position_ids", (row, i) => i < row.Length ? i : 0 },
        };
        var found = new Dictionary<string, AdapterTensor>();
        foreach (var input in session.InputMetadata.Where(input => Kind.Of(input.Key) == null))
        {
            var declared = DeclaredOf(input.Value);
            if (known.ContainsKey(input.Key))
            {
                var numbers = ids.SelectMany(row => Enumerable.Range(0, longest).Select(i => known[input.Key](row, i)));
                var data = numbers.SelectMany(BitConverter.GetBytes).ToArray();
                found[input.Key] = new AdapterTensor { Type = 7, Dims = new long[] { ids.Count, longest }, Data = data };
            }
            else if (input.Key.StartsWith("past_key_values.", StringComparison.Ordinal))
            {
                var dims = new[] { ids.Count, declared.Dims[1], 0, declared.Dims[3] };
                found[input.Key] = new AdapterTensor { Type = declared.Type, Dims = dims, Data = new byte[0] };
            }
            else throw new RefusedException("This sample does not make an input", "model.onnx", input.Key);
        }
        return found;
    }

    static OrtValue ValueOf(AdapterTensor tensor)
    {
        var value = OrtValue.CreateAllocatedTensorValue(OrtAllocator.DefaultInstance, (TensorElementType)tensor.Type, tensor.Dims);
        if (tensor.Data.Length > 0) tensor.Data.AsSpan().CopyTo(value.GetTensorMutableRawData());
        return value;
    }
}
